"""Plots of the grid of fixed rates and of the searches."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import plotly.graph_objects as go

from megatron_adalrs.report.drawing import RUN_COLORS, new_figure
from megatron_adalrs.reproduction.plan import Study, scaled
from megatron_adalrs.reproduction.results import Results, differences

_COLORS = {"fixed": RUN_COLORS[0], "paper": RUN_COLORS[1], "robust": RUN_COLORS[2]}


def grid_figure(results: Results, study: Study, schedule: str) -> go.Figure:
    """Plot final validation loss and velocity against the fixed rate.

    Every seed is a point, the means are a line, and a star marks the best mean.
    """
    rates = results.rates(study.name, schedule)
    runs = [list(results.of(study.name, schedule, "fixed", lr).values()) for lr in rates]
    figure = new_figure("fixed learning rate", "final validation loss", height=420)
    series = (
        ("final validation loss", [[r.valid for r in at] for at in runs], min, "y", RUN_COLORS[0], "solid"),
        (
            "velocity in the search window",
            [[1e3 * r.velocity for r in at] for at in runs],
            max,
            "y2",
            RUN_COLORS[1],
            "dash",
        ),
    )
    for name, values, best_of, axis, color, dash in series:
        means = [fmean(at) for at in values]
        best = means.index(best_of(means))
        points = [(lr, value) for lr, at in zip(rates, values, strict=True) for value in at]
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            yaxis=axis,
            mode="markers",
            showlegend=False,
            marker={"size": 5, "color": color, "opacity": 0.5},
            hoverinfo="skip",
        )
        figure.add_scatter(
            x=rates,
            y=means,
            yaxis=axis,
            name=name,
            mode="lines+markers",
            line={"color": color, "dash": dash},
            hovertemplate="%{x:.3g}: %{y:.4g}",
        )
        figure.add_scatter(
            x=[rates[best]],
            y=[means[best]],
            yaxis=axis,
            name=f"its optimum: {rates[best]:g}",
            mode="markers",
            marker={"symbol": "star", "size": 16, "color": color},
            hovertemplate="%{x:.3g}: %{y:.4g}",
        )
    figure.update_xaxes(type="log", tickformat=".0e")
    # The axis of the velocity is reversed, so that both optima are at the bottom.
    figure.update_layout(
        yaxis2={
            "overlaying": "y",
            "side": "right",
            "autorange": "reversed",
            "showgrid": False,
            "tickformat": ".3g",
            "title": {"text": "velocity, nats per 1000 steps (faster is lower)"},
        },
        margin={"r": 64},
    )
    return figure


def search_figure(
    results: Results, study: Study, schedule: str, ratios: Sequence[float], best: float
) -> go.Figure:
    """Plot the loss above the best fixed rate's against the initial rate, for each method.

    Error bars reach from the best to the worst seed.
    """
    figure = new_figure(
        "initial rate / best fixed rate", "final validation loss above the best fixed", height=400
    )
    at_best = results.of(study.name, schedule, "fixed", best)
    for method, color in _COLORS.items():
        points = []
        for ratio in ratios:
            values = differences(results.of(study.name, schedule, method, scaled(best, ratio)), at_best)
            if values:
                points.append((ratio, fmean(values), min(values), max(values)))
        if points:
            x, y, least, most = zip(*points, strict=True)
            figure.add_scatter(
                x=x,
                y=y,
                name=method,
                mode="lines+markers",
                line={"color": color},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "thickness": 1.3,
                    "width": 4,
                    "color": color,
                    "array": [top - mean for top, mean in zip(most, y, strict=True)],
                    "arrayminus": [mean - low for low, mean in zip(least, y, strict=True)],
                },
                hovertemplate=f"{method} from %{{x:.3g}}: %{{y:+.4f}}",
            )
    figure.update_xaxes(type="log", tickvals=list(ratios), ticktext=[f"{ratio:.3g}" for ratio in ratios])
    return figure
