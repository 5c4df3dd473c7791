"""The plots of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megatron_adalrs.metrics.records import Decision
from megatron_adalrs.metrics.run_log import RunLog, Trial
from megatron_adalrs.report.drawing import (
    RUN_COLORS,
    Run,
    compact,
    escape,
    event_color,
    event_markers,
    line,
    new_figure,
    style,
    undone,
)
from megatron_adalrs.report.series import running_mean, smoothing_window
from megatron_adalrs.utils import format as fmt

_UNDONE_COLOR = event_color("failed")
_DISCARDED = {
    "neutral": "neutral",
    "failed": "failed",
    "aborted": "aborted",
    "interrupted": "interrupted",
    "controls of accepted trials": "accepted",
    "skipped for bad numbers": "loss_guard_skipped",
    "rewound for bad numbers": "loss_guard_rewound",
}
"""Discarded steps by the event that discarded them."""
_CORPUS_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_UNREMARKABLE = {"window", "trial_started", "control_started", "initial_kept", "caught_up"}


@dataclass(frozen=True)
class Plot:
    """A section of the page. Where no run has anything to draw, `figure` is None and `note` says why."""

    key: str
    title: str
    caption: str = ""
    figure: go.Figure | None = None
    note: str = ""


def all_plots(runs: Sequence[Run]) -> list[Plot]:
    return [_loss(runs), _learning_rate(runs), _measure(runs), _discarded(runs), _throughput(runs)]


def _loss(runs: Sequence[Run]) -> Plot:
    note = _non_finite_note(runs)
    if not any(np.isfinite(run.log.train.loss).any() or run.log.evaluations for run in runs):
        return Plot("loss", "Loss", note=note or "No loss was recorded.")
    alone = len(runs) == 1
    figure = new_figure("step (kept)", "loss (nats per token)", height=460)
    shapes = []
    for run in runs:
        _add_loss_curves(figure, run, alone)
        _add_evaluations(figure, run, alone)
        shapes += [_shading(t, event_color(t.verdict) if alone else run.color) for t in run.log.trials]
    for run in runs:
        _add_decisions(figure, run, alone)
    figure.update_layout(shapes=shapes)
    _limit_loss_axis(figure, runs)

    caption = (
        "Thin line: every step; thick: running mean; circles: validation. Double-click shows the whole range."
    )
    if shapes:
        caption += " Shaded: AdaLRS trials, from their snapshot on; dotted: the losses of those undone."
    return Plot("loss", "Loss", caption, figure, note)


def _add_loss_curves(figure: go.Figure, run: Run, alone: bool) -> None:
    train = run.log.train
    step, loss = train.step[train.kept], train.loss[train.kept]
    window = smoothing_window(loss.size)
    hover = "step %{x:,}, loss %{y:.4f}"
    if window > 1:
        line(figure, run, step, loss, width=1, opacity=0.3, hoverinfo="skip")
        hover += f" (mean of {window})"
    label = "training" if alone else run.name
    line(figure, run, step, running_mean(loss, window), label=label, hovertemplate=hover)

    step, loss = undone(run.log, train.loss)
    if step.size:
        line(
            figure,
            run,
            step,
            loss,
            label="undone trials" if alone else "",
            color=_UNDONE_COLOR if alone else "",
            width=1,
            dash="dot",
            opacity=0.7,
            hovertemplate="undone step %{x:,}, loss %{y:.4f}",
        )


def _add_evaluations(figure: go.Figure, run: Run, alone: bool) -> None:
    """Points of each part of the data, and a thin curve of each corpus where a part has several."""
    curves = run.log.evaluated_corpora
    for split in ("valid", "test", *curves):
        points = [evaluation for evaluation in run.log.evaluations if evaluation.split == split]
        if not points:
            continue
        part, _, corpus = split.partition("/")
        name = escape(f"{'validation' if part == 'valid' else part} {corpus}".strip())
        color, dash = run.color, "solid"
        if corpus:
            place = curves.index(split)
            dash = _CORPUS_DASHES[place % len(_CORPUS_DASHES)]
            color = RUN_COLORS[(place + 1) % len(RUN_COLORS)] if alone else run.color
        symbol, size = ("star", 12) if part == "test" else ("circle", 8)
        trace = go.Scatter(
            x=compact([point.step for point in points]),
            y=compact([point.loss for point in points]),
            customdata=compact([point.perplexity for point in points]),
            name=name if alone else escape(run.name),
            legendgroup=name if alone else run.name,
            showlegend=alone,
            mode="lines+markers" if corpus else "markers",
            line={"width": 1, "color": color, "dash": dash} if corpus else None,
            marker={
                "symbol": symbol,
                "size": size - 3 if corpus else size,
                "color": color,
                "line": {"width": 1.5, "color": "white"},
            },
            hovertemplate=f"{name} at step %{{x:,}}: loss %{{y:.4f}}, perplexity %{{customdata:.2f}}",
        )
        figure.add_trace(trace)


def _add_decisions(figure: go.Figure, run: Run, alone: bool) -> None:
    """Marks, on the loss curve, every decision that ended or changed something."""
    train = run.log.train
    drawn = train.kept & np.isfinite(train.loss)
    if not drawn.any():
        return
    curve = running_mean(train.loss[drawn], smoothing_window(int(drawn.sum())))
    marked = [decision for decision in run.log.decisions if decision.event not in _UNREMARKABLE]
    for event in dict.fromkeys(decision.event for decision in marked):
        decisions = [decision for decision in marked if decision.event == event]
        steps = [decision.step for decision in decisions]
        event_markers(
            figure, run, event, steps, np.interp(steps, train.step[drawn], curve), decisions, alone=alone
        )


def _shading(trial: Trial, color: str) -> dict[str, object]:
    return {
        "type": "rect",
        "x0": trial.start_step,
        "x1": trial.start_step + trial.length,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "fillcolor": color,
        "opacity": 0.13,
        "line": {"width": 0},
        "layer": "below",
    }


def _limit_loss_axis(figure: go.Figure, runs: Sequence[Run]) -> None:
    """Keeps a diverged trial, or a few diverged steps, from flattening every curve."""
    kept = [run.log.train.loss[run.log.train.kept & np.isfinite(run.log.train.loss)] for run in runs]
    evaluated = [e.loss for run in runs for e in run.log.evaluations if np.isfinite(e.loss)]
    tops = [max(loss[0], np.quantile(loss, 0.995)) for loss in kept if loss.size] + evaluated
    bottoms = [loss.min() for loss in kept if loss.size] + evaluated
    margin = 0.05 * (max(tops) - min(bottoms)) or 0.1
    figure.update_yaxes(range=[float(min(bottoms) - margin), float(max(tops) + margin)])


def _non_finite_note(runs: Sequence[Run]) -> str:
    notes = []
    for run in runs:
        loss = run.log.train.loss
        bad = int((~np.isfinite(loss)).sum())
        if bad:
            which = f"{run.name}: " if len(runs) > 1 else ""
            verb = "was" if bad == 1 else "were"
            notes.append(
                f"{which}{bad:,} of {loss.size:,} losses {verb} not finite (NaN or infinity) and not drawn."
            )
    return " ".join(notes)


def _learning_rate(runs: Sequence[Run]) -> Plot:
    title = "Learning rate"
    if not any(run.log.train.step.size for run in runs):
        return Plot("lr", title, note="No training step was recorded.")
    scaled = any((run.log.train.scale != 1).any() for run in runs)
    rows = 2 if scaled else 1
    figure = make_subplots(rows, 1, shared_xaxes=True, vertical_spacing=0.09, row_heights=[0.62, 0.38][:rows])
    style(figure, height=480 if scaled else 320)
    for run in runs:
        train = run.log.train
        curves = [(1, train.lr, "learning rate %{y:.3e}"), (2, train.scale, "scale %{y:.4g}")]
        for row, values, hover in curves[:rows]:
            label = run.name if row == 1 and len(runs) > 1 else ""
            hover = "step %{x:,}, " + hover
            kept = train.step[train.kept], values[train.kept]
            line(figure, run, *kept, label=label, row=row, shape="hv", hovertemplate=hover)
            gone = undone(run.log, values)
            if gone[0].size:
                line(figure, run, *gone, row=row, width=1.5, dash="dot", hovertemplate=f"undone {hover}")
    figure.update_yaxes(type="log", tickformat=".0e", nticks=7, title_text="learning rate", row=1)
    if scaled:
        figure.update_yaxes(type="log", tickformat="~g", dtick="D2", title_text="AdaLRS scale (×)", row=2)
    figure.update_xaxes(title_text="step (kept)", row=rows)
    caption = "The rate of a step is schedule × base rate × AdaLRS scale. Dotted: undone trials."
    return Plot("lr", title, caption if scaled else "The AdaLRS scale stayed 1.", figure)


def _measure(runs: Sequence[Run]) -> Plot:
    """What the searches decided by: gains of races, or velocities of windows."""
    raced = any(decision.gain is not None for run in runs for decision in run.log.decisions)
    return _gains(runs) if raced else _velocity(runs)


def _gains(runs: Sequence[Run]) -> Plot:
    figure = new_figure("step (kept) at the verdict", "gain (nats)", height=400)
    for run in runs:
        judged = [
            Measured(decision.event, decision.step, decision.gain, decision.gain_error, decision)
            for decision in run.log.decisions
            if decision.gain is not None and np.isfinite(decision.gain)
        ]
        _add_measured(figure, run, judged, alone=len(runs) == 1)
    caption = (
        "Loss of the control minus loss of the trial, on the same batches; bars: ± 2 standard errors; "
        "colour: verdict."
    )
    return Plot("velocity", "Gain of the trials", caption, figure)


def _velocity(runs: Sequence[Run]) -> Plot:
    title = "Descent velocity"
    figure = new_figure("step (kept) at the window's end", "velocity (nats per 1000 steps)", height=400)
    for run in runs:
        _add_measured(figure, run, _measured_windows(run.log), alone=len(runs) == 1, unit=1e3)
    if not figure.data:
        return Plot(
            "velocity", title, note="No window was measured: AdaLRS was off, or its search had not begun."
        )
    caption = (
        "Minus the least-squares slope of the loss over a window; bars: ± 2 standard errors; colour: verdict."
    )
    return Plot("velocity", title, caption, figure)


class Measured(NamedTuple):
    """What a decision measured: drawn at a step, in the colour of an event."""

    event: str
    step: int
    value: float
    error: float | None
    decision: Decision


def _add_measured(
    figure: go.Figure, run: Run, measured: list[Measured], *, alone: bool, unit: float = 1.0
) -> None:
    """Markers with bars of two standard errors, one trace an event; values are multiplied by `unit`."""
    for event in dict.fromkeys(entry.event for entry in measured):
        entries = [entry for entry in measured if entry.event == event]
        event_markers(
            figure,
            run,
            event,
            [entry.step for entry in entries],
            [unit * entry.value for entry in entries],
            [entry.decision for entry in entries],
            alone=alone,
            errors=[np.nan if entry.error is None else 2 * unit * entry.error for entry in entries],
        )


def _measured_windows(log: RunLog) -> list[Measured]:
    """Decisions with a velocity: what to colour them as, and the step that their window ended at.

    The window of an undone trial ended ahead of the step that the decision went back to. One after which a
    trial started or the search ended was a plain window.
    """
    measured = []
    for decision in log.decisions:
        if decision.velocity is not None and np.isfinite(decision.velocity):
            event = "window" if decision.event in ("trial_started", "search_ended") else decision.event
            step = decision.step + decision.discarded_steps
            measured.append(Measured(event, step, decision.velocity, decision.error, decision))
    return measured


def _discarded(runs: Sequence[Run]) -> Plot:
    title = "Discarded work"
    if not any(run.log.totals.discarded_steps or run.log.totals.lost_steps for run in runs):
        return Plot("discarded", title, note="No step was discarded.")
    parts = {"kept": [run.log.totals.useful_steps for run in runs]}
    for part, event in _DISCARDED.items():
        parts[part] = [sum(d.discarded_steps for d in run.log.decisions if d.event == event) for run in runs]
    parts["lost when a process died"] = [run.log.totals.lost_steps for run in runs]
    whole = [sum(steps) for steps in zip(*parts.values(), strict=True)]

    figure = new_figure("executed steps", "", height=130 + 44 * len(runs))
    for part, steps in parts.items():
        if any(steps):
            trace = go.Bar(
                x=compact(steps),
                y=[escape(run.name) for run in runs],
                orientation="h",
                name=part,
                marker={
                    "color": RUN_COLORS[0] if part == "kept" else event_color(_DISCARDED.get(part, part))
                },
                customdata=[fmt.share(step, total) for step, total in zip(steps, whole, strict=True)],
                hovertemplate=f"{part}: %{{x:,}} steps (%{{customdata}})<extra>%{{y}}</extra>",
            )
            figure.add_trace(trace)
    figure.update_layout(barmode="stack", bargap=0.35, legend_traceorder="normal")
    figure.update_yaxes(autorange="reversed", showticklabels=len(runs) > 1, automargin=True)
    return Plot("discarded", title, "Every executed step, by what became of it.", figure)


def _throughput(runs: Sequence[Run]) -> Plot:
    title = "Throughput"
    figure = new_figure("executed steps, discarded ones included", "tokens per second", height=320)
    for run in runs:
        steps, rate = run.log.train.total_steps, run.log.train.tokens_per_second
        if np.isfinite(rate).any():
            window = smoothing_window(rate.size)
            if window > 1:
                line(figure, run, steps, rate, width=1, opacity=0.3, hoverinfo="skip")
            label = run.name if len(runs) > 1 else ""
            hover = "step %{x:,}: %{y:,.0f} tokens/s"
            line(figure, run, steps, running_mean(rate, window), label=label, hovertemplate=hover)
    if not figure.data:
        return Plot("throughput", title, note="No throughput was recorded.")
    figure.update_yaxes(rangemode="tozero")
    return Plot("throughput", title, "Thin line: every step; thick: running mean.", figure)
