"""Plots of the loss over executed work: the search enlarged, and all runs at equal compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from megatron_adalrs.metrics.run_log import RunLog
from megatron_adalrs.report.drawing import (
    Plot,
    Run,
    compact,
    escape,
    event_color,
    event_markers,
    line,
    new_figure,
    style,
)
from megatron_adalrs.report.loss_plot import UNDONE_COLOR, UNREMARKABLE, limit_loss_axis, loss_range
from megatron_adalrs.report.outcome import search_decisions
from megatron_adalrs.report.series import running_mean, smoothing_window, with_gaps

_MARKER_MEAN = 5
"""Losses that the height of a marker is the mean of."""


def search_plot(runs: Sequence[Run]) -> Plot:
    """Return the plot of the losses during the search, with a row for each run that searched."""
    title = "Search"
    searched = [run for run in runs if search_decisions(run.log) and np.isfinite(run.log.train.loss).any()]
    if not searched:
        return Plot("search", title, note="No run has a decision of a search.")
    count = len(searched)
    names = [escape(run.name) for run in searched] if len(runs) > 1 else None
    height = 110 + 280 * count
    figure = make_subplots(count, 1, subplot_titles=names, vertical_spacing=min(0.2, 70 / height))
    style(figure, height)
    if names:
        # The name of the first row is between the legend and the plot.
        figure.update_annotations(font_size=13)
        figure.update_layout(legend_y=1 + 30 / height, margin_t=30)
    for row, run in enumerate(searched, 1):
        _add_search(figure, run, row)
    figure.update_xaxes(title_text="executed steps, discarded ones included", row=count)
    caption = (
        "Every step in the order of execution, so that no trial covers another. "
        "Shaded: trials, in the colour of their verdict; dotted: undone steps."
    )
    return Plot("search", title, caption, figure)


def _add_search(figure: go.Figure, run: Run, row: int) -> None:
    train = run.log.train
    low, high = _search_range(run.log)
    inside = (train.total_steps >= low) & (train.total_steps <= high)
    for chosen, color, dash, name in (
        (train.kept, run.color, "solid", "kept"),
        (~train.kept, UNDONE_COLOR, "dot", "undone"),
    ):
        x, y = with_gaps(train.total_steps, train.loss, chosen & inside)
        hover = f"{name}: executed step %{{x:,}}, loss %{{y:.4f}}"
        line(figure, run, x, y, row=row, color=color, dash=dash, width=1.4, hovertemplate=hover)
    for trial in run.log.trials:
        figure.add_vrect(
            x0=trial.first_total_step - 0.5,
            x1=trial.last_total_step + 0.5,
            fillcolor=event_color(trial.verdict),
            opacity=0.16,
            line_width=0,
            layer="below",
            row=row,
            col=1,
        )
    _add_verdicts(figure, run, row)
    losses = train.loss[inside & np.isfinite(train.loss)]
    figure.update_xaxes(range=[low, high], row=row)
    figure.update_yaxes(title_text="loss (nats per token)", range=loss_range([losses]), row=row)


def _add_verdicts(figure: go.Figure, run: Run, row: int) -> None:
    train = run.log.train
    finite = np.isfinite(train.loss)
    curve = running_mean(train.loss[finite], _MARKER_MEAN)
    marked = [d for d in search_decisions(run.log) if d.event not in UNREMARKABLE]
    for event in dict.fromkeys(decision.event for decision in marked):
        decisions = [decision for decision in marked if decision.event == event]
        x = [decision.total_steps for decision in decisions]
        y = np.interp(x, train.total_steps[finite], curve)
        event_markers(figure, run, event, x, y, decisions, alone=True, row=row)


def _search_range(log: RunLog) -> tuple[float, float]:
    """Return the executed steps at both ends of the search, with a margin."""
    decisions = search_decisions(log)
    steps = [decision.total_steps for decision in decisions if decision.event != "initial_kept"]
    if decisions[-1].event != "search_ended" or not steps:
        steps.append(log.totals.total_steps)
    margin = max(1.0, 0.08 * (max(steps) - min(steps)))
    return max(0.0, min(steps) - margin), max(steps) + margin


def equal_compute_plot(runs: Sequence[Run]) -> Plot:
    """Return the plot of the losses over executed tokens, or over executed steps if no token was recorded."""
    title = "Loss at equal compute"
    if not any(np.isfinite(run.log.train.loss).any() for run in runs):
        return Plot("compute", title, note="No training loss was recorded.")
    if len(runs) == 1 and not runs[0].log.totals.discarded_steps:
        return Plot(
            "compute", title, note="No step was discarded: it is the same as the loss over kept steps."
        )
    in_tokens = all(run.log.totals.total_tokens for run in runs)
    unit = "tokens" if in_tokens else "steps"
    figure = new_figure(f"executed {unit}, discarded ones included", "loss (nats per token)", height=400)
    if in_tokens:
        figure.update_xaxes(tickformat="~s")
    for run in runs:
        _add_at_compute(figure, run, unit, alone=len(runs) == 1)
    limit_loss_axis(figure, runs)
    caption = f"Running mean of the loss of kept steps, and validation (circles), over all executed {unit}."
    return Plot("compute", title, caption, figure)


def _add_at_compute(figure: go.Figure, run: Run, unit: str, alone: bool) -> None:
    train = run.log.train
    spent = _executed_tokens(run.log) if unit == "tokens" else train.total_steps
    loss = train.loss[train.kept]
    label = "training" if alone else run.name
    hover = f"%{{x:,}} executed {unit}, loss %{{y:.4f}}"
    mean = running_mean(loss, smoothing_window(loss.size))
    line(figure, run, spent[train.kept], mean, label=label, hovertemplate=hover)
    points = [evaluation for evaluation in run.log.evaluations if evaluation.split == "valid"]
    if not points or not spent.size:
        return
    trace = go.Scatter(
        x=compact(np.interp([point.total_steps for point in points], train.total_steps, spent)),
        y=compact([point.loss for point in points]),
        name="validation",
        legendgroup="validation" if alone else run.name,
        showlegend=alone,
        mode="markers",
        marker={"size": 8, "color": run.color, "line": {"width": 1.5, "color": "white"}},
        hovertemplate=f"validation at {hover}",
    )
    figure.add_trace(trace)


def _executed_tokens(log: RunLog) -> NDArray[Any]:
    return log.train.consumed_tokens + log.train.discarded_tokens
