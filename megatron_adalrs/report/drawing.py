"""Building blocks of the plots: lines, event markers, hover texts, and colours for light and dark pages."""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray

from megatron_adalrs.metrics.records import DecisionRecord
from megatron_adalrs.metrics.run_log import RunLog
from megatron_adalrs.report.series import thin
from megatron_adalrs.utils import format as fmt

RUN_COLORS = ("#3b7dd8", "#e0812b", "#2a9d78", "#b65fb0", "#8a7a2d", "#d0506e", "#4aa3b5", "#7b6fd0")
_EVENT_MARKS = {
    "accepted": ("#2a9d5c", "triangle-up"),
    "failed": ("#d64545", "x"),
    "aborted": ("#9c2f6f", "octagon"),
    "neutral": ("#8b8f98", "diamond"),
    "interrupted": ("#b08a2e", "square"),
    "scaled_down": ("#e0812b", "triangle-down"),
    "loss_guard_skipped": ("#c2377a", "cross"),
    "loss_guard_rewound": ("#c2377a", "triangle-left"),
    "loss_guard_stopped": ("#c2377a", "hexagram"),
    "search_ended": ("#6f7bd9", "star"),
    "window": ("#5b9bd5", "circle"),
    "trial_started": ("#5b9bd5", "circle"),
    "control_started": ("#5b9bd5", "circle"),
    "initial_kept": ("#5b9bd5", "circle"),
    "caught_up": ("#5b9bd5", "circle"),
    "running": ("#5b9bd5", "circle"),
}
_OTHER_MARK = ("#8b8f98", "circle")


@dataclass(frozen=True)
class Run:
    """A run with its name and colour on the page."""

    name: str
    color: str
    log: RunLog


@dataclass(frozen=True)
class Plot:
    """A section of the page.

    Attributes:
        key: Id of the section.
        figure: None if no run has data for it; `note` then gives the reason.
    """

    key: str
    title: str
    caption: str = ""
    figure: go.Figure | None = None
    note: str = ""


def event_color(event: str) -> str:
    return _EVENT_MARKS.get(event, _OTHER_MARK)[0]


def event_symbol(event: str) -> str:
    return _EVENT_MARKS.get(event, _OTHER_MARK)[1]


def event_name(event: str) -> str:
    return event.replace("_", " ")


def new_figure(x_title: str, y_title: str, height: int) -> go.Figure:
    """Return an empty figure in the style of the page, which adds fonts and colours when it is displayed."""
    figure = go.Figure()
    style(figure, height)
    figure.update_xaxes(title_text=x_title)
    figure.update_yaxes(title_text=y_title)
    return figure


def style(figure: go.Figure, height: int) -> None:
    """Apply the style of the page to a figure of this height in pixels."""
    figure.layout.template = None
    figure.update_layout(
        height=height,
        margin={"l": 56, "r": 14, "t": 10, "b": 48},
        hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
    )
    figure.update_xaxes(zeroline=False, tickformat=",", title_standoff=8)
    figure.update_yaxes(zeroline=False, title_standoff=8, automargin=True)


def line(
    figure: go.Figure,
    run: Run,
    x: NDArray[Any],
    y: NDArray[np.float64],
    *,
    label: str = "",
    row: int | None = None,
    color: str = "",
    width: float = 2,
    dash: str = "solid",
    shape: str = "linear",
    **options: Any,
) -> None:
    """Add a thinned curve in the run's colour, with a legend entry if `label` is given."""
    x, y = thin(x, y)
    trace = go.Scatter(
        x=compact(x),
        y=compact(y),
        name=escape(label or run.name),
        legendgroup=run.name,
        showlegend=bool(label),
        mode="lines",
        line={"color": color or run.color, "width": width, "dash": dash, "shape": shape},
        **options,
    )
    figure.add_trace(trace, row=row, col=None if row is None else 1)


def undone(log: RunLog, values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return steps and values of the undone steps, with a NaN after each consecutive stretch."""
    gone = np.flatnonzero(~log.train.kept)
    steps = log.train.step[gone]
    # A stretch ends at a kept step and where the run was rolled back.
    ends = np.flatnonzero((np.diff(gone) != 1) | (np.diff(steps) != 1)) + 1
    ends = np.append(ends, steps.size) if steps.size else ends
    return np.insert(steps.astype(np.float64), ends, np.nan), np.insert(values[gone], ends, np.nan)


def event_markers(
    figure: go.Figure,
    run: Run,
    event: str,
    x: ArrayLike,
    y: ArrayLike,
    decisions: list[DecisionRecord],
    *,
    alone: bool,
    errors: ArrayLike | None = None,
    row: int | None = None,
) -> None:
    """Add a marker for each of these decisions, which all have the same event.

    The event gets a legend entry unless it already has one.

    Args:
        alone: Whether the page shows a single run. If not, the markers are outlined in the run's colour.
        errors: Half the lengths of the error bars.
    """
    group = f"event {event}"
    trace = go.Scatter(
        x=compact(x),
        y=compact(y),
        text=[describe(decision) for decision in decisions],
        name=escape(event_name(event)),
        meta=escape(run.name),
        legendgroup=group,
        showlegend=all(other.legendgroup != group for other in figure.data),
        mode="markers",
        marker={
            "symbol": event_symbol(event),
            "size": 11,
            "color": event_color(event),
            "line": {"width": 1 if alone else 1.5, "color": "rgba(255,255,255,0.8)" if alone else run.color},
        },
        hovertemplate="%{text}<extra></extra>" if alone else "%{text}<extra>%{meta}</extra>",
    )
    if errors is not None:
        color = event_color(event) if alone else run.color
        trace.error_y = {
            "type": "data",
            "array": compact(errors),
            "color": color,
            "thickness": 1.3,
            "width": 3,
        }
    figure.add_trace(trace, row=row, col=None if row is None else 1)


def describe(decision: DecisionRecord) -> str:
    """Return the hover text of a decision."""
    lines = [f"<b>{escape(event_name(decision.event))}</b> at step {decision.step:,}"]
    if decision.scale_before != decision.scale_after:
        lines.append(f"scale {decision.scale_before:.4g} → {decision.scale_after:.4g}")
    if decision.velocity is not None:
        lines.append(f"velocity {fmt.velocity(decision.velocity, decision.error)}")
    if decision.gain is not None:
        lines.append(f"gain {fmt.gain(decision.gain, decision.gain_error)}")
    if decision.reference_velocity is not None:
        lines.append(f"reference {fmt.velocity(decision.reference_velocity, decision.reference_error)}")
    if decision.discarded_steps:
        lines.append(f"{decision.discarded_steps:,} steps discarded")
    lines += [escape(part) for part in textwrap.wrap(decision.reason, width=48)]
    return "<br>".join(lines)


def compact(values: ArrayLike) -> NDArray[Any]:
    """Return the values in 4 bytes each, which is exact enough for a plot; infinity becomes NaN, a gap."""
    values = np.asarray(values)
    if np.issubdtype(values.dtype, np.integer):
        return values.astype(np.int32) if np.abs(values).max(initial=0) < 2**31 else values.astype(np.float64)
    with np.errstate(over="ignore"):
        small = values.astype(np.float32)
    return np.where(np.isfinite(small), small, np.float32(np.nan))


def escape(value: str) -> str:
    """Escape text for names and hover texts, in which Plotly interprets a subset of HTML."""
    return html.escape(value, quote=False)
