"""All plots of a report, in order, and those of learning rate, discarded work and throughput."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from megatron_adalrs.report.drawing import (
    RUN_COLORS,
    Plot,
    Run,
    compact,
    escape,
    event_color,
    line,
    new_figure,
    style,
    undone,
)
from megatron_adalrs.report.executed_plots import equal_compute_plot, search_plot
from megatron_adalrs.report.loss_plot import loss_plot
from megatron_adalrs.report.measurement_plot import measurement_plot
from megatron_adalrs.report.series import running_mean, smoothing_window
from megatron_adalrs.utils import format as fmt

_DISCARDED = {
    "neutral": "neutral",
    "failed": "failed",
    "aborted": "aborted",
    "interrupted": "interrupted",
    "controls of accepted trials": "accepted",
    "skipped by the loss guard": "loss_guard_skipped",
    "rewound by the loss guard": "loss_guard_rewound",
}
"""Events that discard steps, by the name of the discarded part."""

_SHOWN_BELOW_PEAK = 0.05
"""Lowest rate on the axis as a part of the lowest peak rate of a scale."""
_RATE_MARGIN = 1.25


def all_plots(runs: Sequence[Run]) -> list[Plot]:
    """Return the plots of these runs in the order of the page."""
    plots = (
        loss_plot,
        search_plot,
        equal_compute_plot,
        learning_rate_plot,
        measurement_plot,
        discarded_plot,
        throughput_plot,
    )
    return [plot(runs) for plot in plots]


def learning_rate_plot(runs: Sequence[Run]) -> Plot:
    """Return the plot of the learning rate and, if it ever was not 1, of the AdaLRS scale."""
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
    figure.update_yaxes(range=_rate_range(runs), row=1)
    if scaled:
        figure.update_yaxes(type="log", tickformat="~g", dtick="D2", title_text="AdaLRS scale (×)", row=2)
    figure.update_xaxes(title_text="step (kept)", row=rows)
    caption = "The rate of a step is schedule × base rate × AdaLRS scale. Dotted: undone trials."
    caption = caption if scaled else "The AdaLRS scale stayed 1."
    return Plot("lr", title, f"{caption} Double-click shows the whole range.", figure)


def _rate_range(runs: Sequence[Run]) -> list[float] | None:
    """Return the decimal logarithms of the rates at both ends of the axis, or None for all rates.

    The axis begins at a part of the lowest peak rate: a cosine schedule ends near 0, and warmup begins there.
    """
    peaks, lows = [], []
    for run in runs:
        rates, scales = run.log.train.lr, run.log.train.scale
        drawn = np.isfinite(rates) & (rates > 0)
        if drawn.any():
            peaks += [rates[drawn & (scales == scale)].max(initial=0) for scale in np.unique(scales[drawn])]
            lows.append(rates[drawn].min())
    if not peaks:
        return None
    low = max(min(lows), min(peaks) * _SHOWN_BELOW_PEAK)
    return [float(np.log10(low / _RATE_MARGIN)), float(np.log10(max(peaks) * _RATE_MARGIN))]


def discarded_plot(runs: Sequence[Run]) -> Plot:
    """Return the bars of kept and discarded steps."""
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
    return Plot("discarded", title, "Executed steps, kept and discarded.", figure)


def throughput_plot(runs: Sequence[Run]) -> Plot:
    """Return the plot of tokens per second over executed steps."""
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
