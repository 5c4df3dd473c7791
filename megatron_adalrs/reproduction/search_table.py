"""Table of the searches of one study: losses above the best fixed rate's, compared with the goals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_adalrs.reproduction.plan import CONTINUAL, EQUAL_COMPUTE, Settings, Study, scaled
from megatron_adalrs.reproduction.results import Result, Results, differences
from megatron_adalrs.reproduction.tables import (
    NOTHING,
    STEPS_TO_REACH,
    Table,
    geometric_mean,
    ratio_name,
    share_of_steps,
)

GOALS: dict[str, dict[float, float]] = {
    "robust, mean": {1 / 30: 0.03, 1 / 10: 0.02, 1: 0.005, 10: 0.08, 100: 0.15},
    "robust, worst": {1 / 30: 0.06, 1 / 10: 0.05, 1: 0.02, 10: 0.20},
    "robust, discarded": {1 / 30: 0.18, 1 / 10: 0.15, 1: 0.15, 10: 0.45, 100: 0.65},
    "robust, equal compute": {1 / 10: 0.05, 1: 0.08, 10: 0.20},
    f"robust, {STEPS_TO_REACH}": {1 / 30: 0.5, 1 / 10: 0.5, 10: 0.7, 100: 0.7},
    "paper, improvement": {1 / 10: 0.05},
    "paper, worst": {1: 0.08},
}
"""Goals by row and by ratio of the initial rate to the best fixed one: upper limits of losses and shares, and
lower limits of the improvement."""
_SHARES = ("discarded", STEPS_TO_REACH)
_CAPTION = (
    "Final validation loss minus that of the best fixed rate ({best:g}) with the same seed. Discarded: share "
    "of train_iters. Rate found: divided by the best fixed one, geometric mean. Steps to the fixed rate's "
    "loss: executed steps, discarded ones included, until the validation loss is the final one of the same "
    "initial rate held fixed, as a share of that run's; in parentheses the number of seeds that reached it, "
    "if not all did. Equal compute: discarded steps count (budget total). The goal is in brackets, with * if "
    "it was missed. "
)

Number = tuple[float, str]
"""A number and its text."""


@dataclass(frozen=True)
class _Cells:
    """Cells of the table by row: each method returns the number at one ratio, or None without runs."""

    results: Results
    study: Study
    schedule: str
    best: float

    def runs(self, method: str, ratio: float, settings: Settings = ()) -> dict[int, Result]:
        return self.results.of(self.study.name, self.schedule, method, scaled(self.best, ratio), settings)

    @property
    def at_best(self) -> dict[int, Result]:
        return self.results.of(self.study.name, self.schedule, "fixed", self.best)

    def above(
        self, method: str, ratio: float, of: Callable[[list[float]], float], settings: Settings = ()
    ) -> Number | None:
        return _number(differences(self.runs(method, ratio, settings), self.at_best), of, "+.3f")

    def discarded(self, method: str, ratio: float) -> Number | None:
        return _number([result.discarded for result in self.runs(method, ratio).values()], fmean, ".1%")

    def rate_found(self, method: str, ratio: float) -> Number | None:
        found = [result.run.lr * result.scale / self.best for result in self.runs(method, ratio).values()]
        return _number(found, geometric_mean, ".2f")

    def steps(self, method: str, ratio: float) -> Number | None:
        return share_of_steps(self.runs(method, ratio), self.runs("fixed", ratio))

    def improvement(self, ratio: float) -> Number | None:
        return _number(differences(self.runs("fixed", ratio), self.runs("paper", ratio)), fmean, "+.3f")


def search_table(
    results: Results, study: Study, schedule: str, ratios: Sequence[float], best: float
) -> Table:
    """Return the table of a study: one row per method and figure, one column per initial rate."""
    cells = _Cells(results, study, schedule, best)
    rows: dict[str, Callable[[float], Number | None]] = {
        "fixed, mean": lambda ratio: cells.above("fixed", ratio, fmean),
        "fixed, worst": lambda ratio: cells.above("fixed", ratio, max),
    }
    rows |= _method_rows(cells, "paper") | _method_rows(cells, "robust")
    if any(cells.runs("robust", ratio, EQUAL_COMPUTE) for ratio in ratios):
        rows["robust, equal compute"] = lambda ratio: cells.above("robust", ratio, fmean, EQUAL_COMPUTE)
    rows["paper, improvement"] = cells.improvement
    seeds = len(cells.at_best)
    return Table(
        f"Searches: {study.name}, {schedule}, {seeds} seed{'s' if seeds != 1 else ''}",
        ("initial rate / best fixed", *(ratio_name(ratio) for ratio in ratios)),
        tuple(
            (label, *(_with_goal(study, label, ratio, cell(ratio)) for ratio in ratios))
            for label, cell in rows.items()
        ),
        _CAPTION.format(best=best) + findings(results, study, schedule, ratios, best),
    )


def _method_rows(cells: _Cells, method: str) -> dict[str, Callable[[float], Number | None]]:
    return {
        f"{method}, mean": lambda ratio: cells.above(method, ratio, fmean),
        f"{method}, worst": lambda ratio: cells.above(method, ratio, max),
        f"{method}, discarded": lambda ratio: cells.discarded(method, ratio),
        f"{method}, rate found": lambda ratio: cells.rate_found(method, ratio),
        f"{method}, {STEPS_TO_REACH}": lambda ratio: cells.steps(method, ratio),
    }


def _with_goal(study: Study, label: str, ratio: float, number: Number | None) -> str:
    """Return the text of a cell, with the goal in brackets and * if it was missed.

    The goals are for runs from random weights.
    """
    if number is None:
        return NOTHING
    value, text = number
    goal = next((goal for known, goal in GOALS.get(label, {}).items() if math.isclose(known, ratio)), None)
    if goal is None or study == CONTINUAL:
        return text
    is_lower_limit = label.endswith("improvement")
    is_missed = value < goal if is_lower_limit else not value <= goal
    shown = f"{goal:.0%}" if label.endswith(_SHARES) else f"{goal:g}"
    return f"{text} [{'≥' if is_lower_limit else '≤'} {shown}]{'*' if is_missed else ''}"


def findings(results: Results, study: Study, schedule: str, ratios: Sequence[float], best: float) -> str:
    """Return one sentence per mode that says in how many runs it was worse than its initial rate."""
    sentences = []
    for method in ("paper", "robust"):
        losses: list[tuple[float, float]] = []  # loss above that of the fixed initial rate, and the ratio
        discarded: list[float] = []
        for ratio in ratios:
            lr = scaled(best, ratio)
            runs = results.of(study.name, schedule, method, lr)
            fixed = results.of(study.name, schedule, "fixed", lr)
            losses += [(worse, ratio) for worse in differences(runs, fixed)]
            discarded += [result.discarded for result in runs.values()]
        if not losses:
            continue
        harmed = [(worse, ratio) for worse, ratio in losses if worse > 0]
        most = f", by up to {max(harmed)[0]:.3f} (from {ratio_name(max(harmed)[1])})" if harmed else ""
        sentences.append(
            f"{method.capitalize()} mode ended above the initial rate held fixed in {len(harmed)} of "
            f"{len(losses)} runs{most}; it discarded {fmean(discarded):.0%} of train_iters on average."
        )
    return " ".join(sentences)


def _number(values: list[float], of: Callable[[list[float]], float], shape: str) -> Number | None:
    if not values:
        return None
    value = of(values)
    return value, format(value, shape)
