"""Results to be asked for, and compared with each other: always with another run of the same seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from megatron_adalrs.reproduction.plan import Settings
from megatron_adalrs.reproduction.results import Result


class Results:
    """All results, to be asked for."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.all = list(results)

    def of(
        self, study: str, schedule: str, method: str, lr: float | None = None, settings: Settings = ()
    ) -> dict[int, Result]:
        """By seed."""
        return {
            result.run.seed: result
            for result in self.all
            if (result.run.study, result.run.schedule, result.run.method) == (study, schedule, method)
            and (lr is None or result.run.lr == lr)
            and result.run.settings == settings
        }

    def rates(self, study: str, schedule: str, method: str = "fixed") -> list[float]:
        runs = [result.run for result in self.all]
        return sorted(
            {run.lr for run in runs if (run.study, run.schedule, run.method) == (study, schedule, method)}
        )

    def best_rate(self, study: str, schedule: str, among: Sequence[float] | None = None) -> float:
        """The fixed rate with the lowest mean of the final validation losses.

        Raises:
            ValueError: no fixed rate ended with a finite loss.
        """
        losses = {
            lr: fmean(result.valid for result in self.of(study, schedule, "fixed", lr).values())
            for lr in (among or self.rates(study, schedule))
            if self.of(study, schedule, "fixed", lr)
        }
        finite = {lr: loss for lr, loss in losses.items() if math.isfinite(loss)}
        if not finite:
            raise ValueError(
                f"{study}, {schedule}: no run at a fixed rate ended with a finite loss to compare with"
            )
        return min(finite, key=finite.__getitem__)


def differences(results: Mapping[int, Result], references: Mapping[int, Result]) -> list[float]:
    """Final validation losses minus those of the references of the same seeds."""
    return [result.valid - references[seed].valid for seed, result in results.items() if seed in references]


def steps_to_reach(result: Result, loss: float) -> float | None:
    """Executed steps, discarded ones included, after which the validation loss is first at or below `loss`.

    Between two evaluations it is taken to fall along a line. None: never.
    """
    before: tuple[int, float] | None = None
    for steps, value in result.curve:
        if value <= loss:
            if before is None or not math.isfinite(before[1]):
                return float(steps)
            return before[0] + (steps - before[0]) * (before[1] - loss) / (before[1] - value)
        before = steps, value
    return None


def ratio_name(ratio: float) -> str:
    """1/30, 1 or 10."""
    return f"{ratio:.3g}" if ratio >= 0.995 else f"1/{1 / ratio:.3g}"
