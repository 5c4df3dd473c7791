"""What is aimed at in the table of searches, and what a reader should know before the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from megatron_adalrs.reproduction.comparison import Results, differences, ratio_name
from megatron_adalrs.reproduction.plan import CONTINUAL, Study, scaled

STEPS_TO_REACH = "steps to the fixed rate's loss"
GOALS = {
    "robust, mean": {1 / 30: 0.03, 1 / 10: 0.02, 1: 0.005, 10: 0.08, 100: 0.15},
    "robust, worst": {1 / 30: 0.06, 1 / 10: 0.05, 1: 0.02, 10: 0.20},
    "robust, discarded": {1 / 30: 0.18, 1 / 10: 0.15, 1: 0.15, 10: 0.45, 100: 0.65},
    "robust, equal compute": {1 / 10: 0.05, 1: 0.08, 10: 0.20},
    f"robust, {STEPS_TO_REACH}": {1 / 30: 0.5, 1 / 10: 0.5, 10: 0.7, 100: 0.7},
    "paper, improvement": {1 / 10: 0.05},
    "paper, worst": {1: 0.08},
}
"""By initial rate over the best fixed one: losses and shares at most, the improvement at least."""
_SHARES = ("discarded", STEPS_TO_REACH)


def goal_text(study: Study, label: str, ratio: float, value: float) -> str:
    """The goal in brackets, * where it is missed; empty where there is none: all are for runs from random
    weights."""
    goal = next((goal for known, goal in GOALS.get(label, {}).items() if math.isclose(known, ratio)), None)
    if goal is None or study == CONTINUAL:
        return ""
    is_least = label.endswith("improvement")
    missed = value < goal if is_least else not value <= goal
    shown = f"{goal:.0%}" if label.endswith(_SHARES) else f"{goal:g}"
    return f" [{'≥' if is_least else '≤'} {shown}]{'*' if missed else ''}"


def findings(results: Results, study: Study, schedule: str, ratios: Sequence[float], best: float) -> str:
    """Where each mode harmed: against the very rate that it was given."""
    sentences = []
    for method in ("paper", "robust"):
        losses: list[tuple[float, float]] = []  # against the fixed rate, and where
        discarded: list[float] = []
        for ratio in ratios:
            lr = scaled(best, ratio)
            runs = results.of(study.name, schedule, method, lr)
            losses += [
                (worse, ratio) for worse in differences(runs, results.of(study.name, schedule, "fixed", lr))
            ]
            discarded += [result.discarded for result in runs.values()]
        if not losses:
            continue
        harmed = [(worse, ratio) for worse, ratio in losses if worse > 0]
        most = f", by up to {max(harmed)[0]:.3f} (from {ratio_name(max(harmed)[1])})" if harmed else ""
        sentences.append(
            f"{method.capitalize()} mode ended above the initial rate held fixed in {len(harmed)} of "
            f"{len(losses)} "
            f"runs{most}; it discarded {fmean(discarded):.0%} of train_iters on average."
        )
    return " ".join(sentences)
