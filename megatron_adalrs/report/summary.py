"""Headline figures: cards for one run, a table with differences for several runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_adalrs.metrics.run_log import RunLog
from megatron_adalrs.utils import format as fmt

Comparison = Literal["difference", "ratio", "percent"]
Verdict = Literal["better", "worse", ""]
VERDICT_ORDER = ("accepted", "failed", "aborted", "neutral", "interrupted", "running")


@dataclass(frozen=True)
class Figure:
    """A headline figure of a run; differences between runs are taken of `value`."""

    text: str
    note: str = ""
    value: float | None = None


@dataclass(frozen=True)
class Cell:
    """A headline figure as it is displayed."""

    text: str
    note: str
    difference: str
    """Difference from the first run; empty if there is nothing to compare."""
    verdict: Verdict


@dataclass(frozen=True)
class Row:
    """A headline figure of all runs."""

    label: str
    cells: tuple[Cell, ...]


def headline(runs: Sequence[RunLog]) -> list[Row]:
    """Return the headline figures with one cell per run, without those that no run has."""
    rows = []
    for label, figure_of, comparison, lower_is_better in (*_FIGURES, *_of_corpora(runs), *_consumed(runs)):
        figures = [figure_of(run) for run in runs]
        if any(figure is not None for figure in figures):
            cells = tuple(_cell(figure, figures[0], comparison, lower_is_better) for figure in figures)
            rows.append(Row(label, cells))
    return rows


def _cell(figure: Figure | None, first: Figure | None, comparison: Comparison, lower_is_better: bool) -> Cell:
    if figure is None:
        return Cell(fmt.NOTHING, "", "", "")
    if figure is first or first is None or figure.value is None or first.value is None:
        return Cell(figure.text, figure.note, "", "")
    difference = _difference(figure.value, first.value, comparison)
    verdict: Verdict = ""
    if lower_is_better and figure.value != first.value:
        verdict = "better" if figure.value < first.value else "worse"
    return Cell(figure.text, figure.note, difference, verdict)


def _difference(value: float, first: float, comparison: Comparison) -> str:
    if not (math.isfinite(value) and math.isfinite(first)):
        return ""
    if value == first:
        return "same"
    if comparison == "difference":
        return f"{value - first:+.4f}".replace("-", "−")
    if first == 0:
        return ""
    if comparison == "ratio":
        return f"× {value / first:.3g}"
    return f"{value / first - 1:+.1%}".replace("-", "−")


def _last_evaluation(split: str) -> Callable[[RunLog], Figure | None]:
    def figure(run: RunLog) -> Figure | None:
        evaluations = [e for e in run.evaluations if e.split == split]
        if not evaluations:
            return None
        last = evaluations[-1]
        note = f"at step {fmt.count(last.step)}"
        best = min(evaluations, key=lambda e: e.loss if math.isfinite(e.loss) else math.inf)
        if best.loss < last.loss:
            note += f"; best {best.loss:.4f} at step {fmt.count(best.step)}"
        return Figure(f"{last.loss:.4f}", note, last.loss)

    return figure


def _perplexity(run: RunLog) -> Figure | None:
    evaluations = [e for e in run.evaluations if e.split == "valid"]
    if not evaluations:
        return None
    return Figure(f"{evaluations[-1].perplexity:,.2f}", "", evaluations[-1].perplexity)


def training_loss(run: RunLog) -> Figure | None:
    """Return the mean training loss of the last kept steps, or None if none of them is finite."""
    loss = run.train.loss[run.train.kept]
    tail = loss[-max(1, loss.size // 50) :]
    finite = tail[np.isfinite(tail)]
    if not finite.size:
        return None
    mean = float(finite.mean())
    return Figure(f"{mean:.4f}", f"mean of the last {fmt.count(tail.size)} kept steps", mean)


def given_rate(run: RunLog) -> float | None:
    """Return the learning rate of the configuration, or None if it has none."""
    lr = run.config.get("lr")
    return None if isinstance(lr, bool) or not isinstance(lr, (int, float)) else float(lr)


def _learning_rate(run: RunLog) -> Figure | None:
    lr = given_rate(run)
    if lr is None:
        return Figure(f"× {run.scale:.4g}", "of the initial rate", run.scale)
    if not run.decisions:
        return Figure(fmt.scientific(lr), "as given: no AdaLRS decision", lr)
    return Figure(
        fmt.scientific(lr * run.scale), f"{fmt.scientific(lr)} given × {run.scale:.4g}", lr * run.scale
    )


def verdict_counts(run: RunLog) -> str:
    """Return how many trials had each verdict, such as '2 accepted, 1 failed'."""
    verdicts = Counter(trial.verdict for trial in run.trials)
    return ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in VERDICT_ORDER if verdicts[verdict])


def _trials(run: RunLog) -> Figure | None:
    if not run.decisions:
        return None
    parts = [verdict_counts(run)] * bool(run.trials)
    cuts = sum(decision.event == "scaled_down" for decision in run.decisions)
    parts += [f"{cuts} scaled down outside trials"] * bool(cuts)
    return Figure(fmt.count(len(run.trials)), ", ".join(parts), float(len(run.trials)))


def _steps(run: RunLog) -> Figure | None:
    totals = run.totals
    note = _discarded(totals.discarded_steps, totals.total_steps, fmt.count)
    if totals.lost_steps:
        note += f"; {fmt.count(totals.lost_steps)} more lost when a process died"
    return Figure(fmt.count(totals.useful_steps), note, totals.useful_steps)


def _tokens(run: RunLog) -> Figure | None:
    totals = run.totals
    if not totals.total_tokens:
        return None
    note = _discarded(totals.discarded_tokens, totals.total_tokens, fmt.quantity)
    return Figure(fmt.quantity(totals.useful_tokens), note, totals.useful_tokens)


def _discarded(discarded: float, total: float, write: Callable[[float], str]) -> str:
    if not discarded:
        return "none discarded"
    return f"+ {write(discarded)} discarded ({fmt.share(discarded, total)}) = {write(total)} executed"


def _wall_time(run: RunLog) -> Figure | None:
    resumes = sum(event.event == "resume" for event in run.events)
    note = f"in {resumes + 1} processes" if resumes else ""
    return Figure(fmt.duration(run.totals.wall_seconds), note, run.totals.wall_seconds)


def _snapshots(run: RunLog) -> Figure | None:
    if not run.trials:
        return None
    seconds = run.totals.snapshot_seconds
    note = f"{fmt.share(seconds, run.totals.wall_seconds)} of the wall time"
    sizes = [event.snapshot_bytes for event in run.events if event.snapshot_bytes]
    if sizes:
        note += f"; {fmt.quantity(sizes[-1], 'B')} of memory"
    return Figure(fmt.duration(seconds), note, seconds)


def _throughput(run: RunLog) -> Figure | None:
    rate = _median(run.train.tokens_per_second)
    if rate is None:
        return None
    flops = _median(run.train.flops_per_second)
    note = "median" + (f"; {fmt.quantity(flops, 'FLOP/s')} in the model" if flops else "")
    return Figure(f"{fmt.quantity(rate)} tokens/s", note, rate)


def _memory(run: RunLog) -> Figure | None:
    finite = run.train.memory_bytes[np.isfinite(run.train.memory_bytes)]
    return (
        Figure(fmt.quantity(float(finite.max()), "B"), "largest seen", float(finite.max()))
        if finite.size
        else None
    )


def _median(values: NDArray[np.float64]) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None


_Headline = tuple[str, Callable[[RunLog], Figure | None], Comparison, bool]
_FIGURES: tuple[_Headline, ...] = (
    ("Validation loss", _last_evaluation("valid"), "difference", True),
    ("Validation perplexity", _perplexity, "percent", True),
    ("Test loss", _last_evaluation("test"), "difference", True),
    ("Training loss", training_loss, "difference", True),
    ("Learning rate found", _learning_rate, "ratio", False),
    ("AdaLRS trials", _trials, "ratio", False),
    ("Useful steps", _steps, "percent", False),
    ("Useful tokens", _tokens, "percent", False),
    ("Wall time", _wall_time, "percent", False),
    ("Time for snapshots", _snapshots, "percent", False),
    ("Throughput", _throughput, "percent", False),
    ("Memory", _memory, "percent", False),
)


def _of_corpora(runs: Sequence[RunLog]) -> Iterator[_Headline]:
    """Yield the last loss on each corpus for the splits that have several corpora."""
    for split in dict.fromkeys(split for run in runs for split in run.evaluated_corpora):
        part, _, name = split.partition("/")
        label = f"{'Validation' if part == 'valid' else 'Test'} loss on {name}"
        yield label, _last_evaluation(split), "difference", True


def _consumed(runs: Sequence[RunLog]) -> Iterator[_Headline]:
    """Yield the tokens that the kept steps consumed of each corpus of a blend, as last recorded."""
    uses = [run.corpora.corpora for run in runs if run.corpora and len(run.corpora.corpora) > 1]
    for name in dict.fromkeys(use.name for corpora in uses for use in corpora):
        yield f"Trained on {name}", _tokens_of(name), "percent", False


def _tokens_of(name: str) -> Callable[[RunLog], Figure | None]:
    def figure(run: RunLog) -> Figure | None:
        corpora = run.corpora.corpora if run.corpora else ()
        total = sum(use.tokens for use in corpora)
        for use in corpora:
            if use.name == name:
                note = f"tokens, {fmt.share(use.tokens, total)}; {use.epochs:.3g} epochs"
                return Figure(fmt.quantity(use.tokens), note, use.tokens)
        return None

    return figure
