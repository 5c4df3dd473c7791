"""Plot of the measurements that the search decides by: gains of trials, or loss descent velocities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from megatron_adalrs.metrics.records import DecisionRecord
from megatron_adalrs.metrics.run_log import RunLog
from megatron_adalrs.report.drawing import (
    Plot,
    Run,
    compact,
    escape,
    event_markers,
    new_figure,
)

_THRESHOLD_COLOR = "#8b8f98"
_AGAINST_REFERENCE = frozenset({"accepted", "failed", "neutral"})
"""Verdicts on a velocity, whose threshold is the margin around the reference velocity."""
_ABSOLUTE = frozenset({"scaled_down", "trial_started", "window"})
"""Decisions on a velocity whose threshold is a velocity."""


def measurement_plot(runs: Sequence[Run]) -> Plot:
    """Return the plot of the gains of the races if there are any, else of the velocities of the windows."""
    raced = any(decision.gain is not None for run in runs for decision in run.log.decisions)
    return _gains(runs) if raced else _velocity(runs)


def _gains(runs: Sequence[Run]) -> Plot:
    figure = new_figure("step (kept) at the verdict", "gain (nats)", height=400)
    for run in runs:
        judged = [
            _Measured(decision.event, decision.step, decision.gain, decision.gain_error, decision)
            for decision in run.log.decisions
            if decision.gain is not None and np.isfinite(decision.gain)
        ]
        _add_measured(figure, run, judged, alone=len(runs) == 1)
    caption = (
        "Loss of the control minus loss of the trial, on the same batches; bars: ± standard error; "
        "colour: verdict. A horizontal mark is the gain that the rule of the verdict compares with."
    )
    return Plot("velocity", "Gain of the trials", caption, figure)


def _velocity(runs: Sequence[Run]) -> Plot:
    title = "Descent velocity"
    figure = new_figure("step (kept) at the window's end", "velocity (nats per step)", height=400)
    for run in runs:
        _add_measured(figure, run, _measured_windows(run.log), alone=len(runs) == 1)
    if not figure.data:
        return Plot(
            "velocity", title, note="No window was measured: AdaLRS was off, or its search had not begun."
        )
    caption = (
        "Minus the least-squares slope of the loss over a window; bars: ± standard error; colour: verdict. "
        "Horizontal marks are the bounds that the rule of the verdict compares with."
    )
    return Plot("velocity", title, caption, figure)


class _Measured(NamedTuple):
    """The measurement of a decision, drawn at `step` in the colour of `event`."""

    event: str
    step: int
    value: float
    error: float | None
    decision: DecisionRecord


def _add_measured(figure: go.Figure, run: Run, measured: list[_Measured], *, alone: bool) -> None:
    """Add markers with bars of one standard error, one trace per event, and the thresholds of verdicts."""
    for event in dict.fromkeys(entry.event for entry in measured):
        entries = [entry for entry in measured if entry.event == event]
        event_markers(
            figure,
            run,
            event,
            [entry.step for entry in entries],
            [entry.value for entry in entries],
            [entry.decision for entry in entries],
            alone=alone,
            errors=[np.nan if entry.error is None else entry.error for entry in entries],
        )
    _add_thresholds(figure, run, measured, alone)


def _add_thresholds(figure: go.Figure, run: Run, measured: list[_Measured], alone: bool) -> None:
    """Add a horizontal mark at each value that a measurement was compared with."""
    marks = [(entry.step, bound) for entry in measured for bound in _bounds(entry.decision)]
    if not marks:
        return
    group = "threshold"
    trace = go.Scatter(
        x=compact([step for step, _ in marks]),
        y=compact([bound for _, bound in marks]),
        name=group,
        meta=escape(run.name),
        legendgroup=group,
        showlegend=all(other.legendgroup != group for other in figure.data),
        mode="markers",
        marker={
            "symbol": "line-ew-open",
            "size": 22,
            "color": _THRESHOLD_COLOR if alone else run.color,
            "line": {"width": 2},
        },
        hovertemplate="threshold %{y:.4g} at step %{x:,}<extra></extra>",
    )
    figure.add_trace(trace)


def _bounds(decision: DecisionRecord) -> list[float]:
    """Return the gain or the velocities that the measurement of a decision was compared with."""
    threshold, reference = decision.threshold, decision.reference_velocity
    if threshold is None or not np.isfinite(threshold):
        return []
    if decision.gain is not None or decision.event in _ABSOLUTE:
        return [threshold]
    if decision.event in _AGAINST_REFERENCE and reference is not None and np.isfinite(reference):
        return [reference - threshold, reference + threshold]
    return []


def _measured_windows(log: RunLog) -> list[_Measured]:
    """Return the velocities of the decisions, each at the step at which its window ended.

    The window of an undone trial ended after the step that the run was rolled back to. A window that was
    followed by a trial or by the end of the search is drawn as a plain window.
    """
    measured = []
    for decision in log.decisions:
        if decision.velocity is not None and np.isfinite(decision.velocity):
            event = "window" if decision.event in ("trial_started", "search_ended") else decision.event
            step = decision.step + decision.discarded_steps
            measured.append(_Measured(event, step, decision.velocity, decision.error, decision))
    return measured
