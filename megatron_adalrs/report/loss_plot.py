"""Plot of the training loss, with evaluations, trials and decisions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from megatron_adalrs.metrics.kept_steps import Trial
from megatron_adalrs.report.drawing import (
    RUN_COLORS,
    Plot,
    Run,
    compact,
    escape,
    event_color,
    event_markers,
    line,
    new_figure,
    undone,
)
from megatron_adalrs.report.series import running_mean, smoothing_window

_SHADING_COLOR = "#8b8f98"
UNDONE_COLOR = event_color("failed")
_CORPUS_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
UNREMARKABLE = {"window", "trial_started", "control_started", "initial_kept", "caught_up"}
"""Events without a marker on the loss curve: they change nothing, or a later event shows their result."""


def loss_plot(runs: Sequence[Run]) -> Plot:
    """Return the plot of the losses of all runs."""
    note = _non_finite_note(runs)
    if not any(np.isfinite(run.log.train.loss).any() or run.log.evaluations for run in runs):
        return Plot("loss", "Loss", note=note or "No loss was recorded.")
    alone = len(runs) == 1
    figure = new_figure("step (kept)", "loss (nats per token)", height=460)
    shapes = []
    for run in runs:
        _add_loss_curves(figure, run, alone)
        _add_evaluations(figure, run, alone)
        color = _SHADING_COLOR if alone else run.color
        shapes += [_shading(first, last, color) for first, last in _covered(run.log.trials)]
    for run in runs:
        _add_decisions(figure, run, alone)
    figure.update_layout(shapes=shapes)
    limit_loss_axis(figure, runs)

    caption = (
        "Thin line: every step; thick: running mean; circles: validation. Double-click shows the whole range."
    )
    if shapes:
        caption += " Shaded: steps at which trials were made; dotted: losses of undone trials."
    return Plot("loss", "Loss", caption, figure, note)


def _add_loss_curves(figure: go.Figure, run: Run, alone: bool) -> None:
    train = run.log.train
    step, loss = train.step[train.kept], train.loss[train.kept]
    window = smoothing_window(loss.size)
    hover = "step %{x:,}, loss %{y:.4f}"
    if window > 1:
        line(figure, run, step, loss, width=1, opacity=0.3 if alone else 0.15, hoverinfo="skip")
        hover += f" (mean of {window})"
    label = "training" if alone else run.name
    line(figure, run, step, running_mean(loss, window), label=label, hovertemplate=hover)

    undone_steps, undone_loss = undone(run.log, train.loss)
    if undone_steps.size:
        line(
            figure,
            run,
            undone_steps,
            undone_loss,
            label="undone trials" if alone else "",
            color=UNDONE_COLOR if alone else "",
            width=1,
            dash="dot",
            opacity=0.7,
            hovertemplate="undone step %{x:,}, loss %{y:.4f}",
        )


def _add_evaluations(figure: go.Figure, run: Run, alone: bool) -> None:
    """Add the losses of each split as points, and of each corpus as a thin curve if a split has several."""
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
    """Mark on the loss curve every decision that ended or changed something."""
    train = run.log.train
    drawn = train.kept & np.isfinite(train.loss)
    if not drawn.any():
        return
    curve = running_mean(train.loss[drawn], smoothing_window(int(drawn.sum())))
    marked = [decision for decision in run.log.decisions if decision.event not in UNREMARKABLE]
    for event in dict.fromkeys(decision.event for decision in marked):
        decisions = [decision for decision in marked if decision.event == event]
        steps = [decision.step for decision in decisions]
        event_markers(
            figure, run, event, steps, np.interp(steps, train.step[drawn], curve), decisions, alone=alone
        )


def _covered(trials: Sequence[Trial]) -> list[tuple[int, int]]:
    """Return the stretches of kept steps that trials cover, each once however many trials were made there."""
    stretches: list[tuple[int, int]] = []
    for first, last in sorted((trial.start_step, trial.start_step + trial.length) for trial in trials):
        if stretches and first <= stretches[-1][1]:
            stretches[-1] = (stretches[-1][0], max(last, stretches[-1][1]))
        else:
            stretches.append((first, last))
    return stretches


def _shading(first: int, last: int, color: str) -> dict[str, object]:
    return {
        "type": "rect",
        "x0": first,
        "x1": last,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "fillcolor": color,
        "opacity": 0.13,
        "line": {"width": 0},
        "layer": "below",
    }


def limit_loss_axis(figure: go.Figure, runs: Sequence[Run]) -> None:
    """Limit the axis so that a diverged trial, or a few diverged steps, do not flatten every curve."""
    kept = [run.log.train.loss[run.log.train.kept & np.isfinite(run.log.train.loss)] for run in runs]
    evaluated = [e.loss for run in runs for e in run.log.evaluations if np.isfinite(e.loss)]
    figure.update_yaxes(range=loss_range(kept, evaluated))


def loss_range(losses: Sequence[NDArray[np.float64]], always: Sequence[float] = ()) -> list[float] | None:
    """Return both ends of an axis for finite losses, or None if there are none.

    Args:
        losses: Curves, of which the highest losses may be outside the axis, except the first.
        always: Losses that the axis must include.
    """
    tops = [max(loss[0], np.quantile(loss, 0.995)) for loss in losses if loss.size] + [*always]
    bottoms = [loss.min() for loss in losses if loss.size] + [*always]
    if not tops:
        return None
    margin = 0.05 * (max(tops) - min(bottoms)) or 0.1
    return [float(min(bottoms) - margin), float(max(tops) + margin)]


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
