"""Study of simulated runs with different noise, lengths and initial rates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, geometric_mean

from megatron_adalrs.adalrs.search_plan import RacePlan, SearchPlan
from megatron_adalrs.adalrs.settings import AdaLRSSettings
from megatron_adalrs.analysis.loss_log import read_loss_log
from megatron_adalrs.analysis.search_lengths import lengths_in_steps, with_lengths
from megatron_adalrs.analysis.simulate import Outcome, Simulation, Surface, surface_like
from megatron_adalrs.optim.lr_schedule import decay_factor

_WARMUP, _WSD_DECAY, _FLOOR = 0.03, 0.2, 0.1


@dataclass(frozen=True)
class Cell:
    """Means over the runs of one combination; the results are None if the search does not fit in the run."""

    mode: str
    noise: float
    length: float
    steps: str
    """Lengths in steps, for display."""
    initial: float
    within_two: float | None = None
    """Fraction of runs that ended within a factor of 2 of the best fixed rate."""
    found: float | None = None
    """Geometric mean of the final rates, relative to the best fixed rate."""
    excess: float | None = None
    """Final loss minus that of the best fixed rate, in nats."""
    worst: float | None = None
    """Largest `excess` of a run."""
    gained: float | None = None
    """Final loss of the fixed initial rate minus final loss of the run, in nats."""
    discarded: float | None = None
    """Discarded steps as a fraction of train_iters."""


def schedule(name: str, train_iters: int) -> list[float]:
    """Return the factor on the base rate at every step; the name is "cosine" or "WSD"."""
    warmup = warmup_iters(train_iters)
    decay = round(_WSD_DECAY * train_iters)
    factors = []
    for step in range(train_iters):
        if step < warmup:
            factors.append((step + 1) / warmup)
        elif name == "cosine":
            factors.append(decay_factor("cosine", (step - warmup) / (train_iters - warmup), _FLOOR))
        else:
            factors.append(decay_factor("linear", max(0, step - train_iters + decay) / decay, _FLOOR))
    return factors


def warmup_iters(train_iters: int) -> int:
    """Return the number of warm-up steps of a simulated run."""
    return round(_WARMUP * train_iters)


def surface_of(
    like: Path | None, column: str | None, tag: str | None, schedule_name: str, ratio: float
) -> Surface:
    """Return the default surface, or one with the noise and descent of a recorded loss.

    Args:
        like: Record, see `read_loss_log`; None for the default surface.
        column: Column or key of the loss.
        tag: TensorBoard tag of the loss.
        schedule_name: Schedule of the recorded run.
        ratio: Base rate of the recorded run relative to the rate of fastest descent.

    Raises:
        OSError: If the record cannot be read.
        ValueError: If the record contains no loss, or the descent cannot be fitted.
    """
    if like is None:
        return Surface()
    log = read_loss_log(like, column, tag)
    # The fit is in recorded points, each of which is used as the mean of its steps.
    fitted = surface_like(log.losses, schedule(schedule_name, len(log.losses)), ratio)
    default = Surface()
    return replace(
        fitted,
        pace=fitted.pace * log.interval,
        noise=fitted.noise * math.sqrt(log.interval),
        cooling=default.cooling,
    )


class Study:
    """Simulated runs of one length and schedule on one surface, with different noise.

    Args:
        surface: Model of the loss.
        schedule_name: "cosine" or "WSD".
        train_iters: Number of steps of a run.
        block: Number of steps that are simulated as one. Noise, descent and lengths are still in steps.
    """

    def __init__(self, surface: Surface, schedule_name: str, train_iters: int, block: int) -> None:
        self.surface, self.schedule_name, self.train_iters, self.block = (
            surface,
            schedule_name,
            train_iters,
            block,
        )
        self._factors = schedule(schedule_name, train_iters)[::block]

    def cells(
        self,
        settings: AdaLRSSettings,
        noises: Sequence[float],
        lengths: Sequence[float],
        initial: Sequence[float],
        seeds: Sequence[int],
    ) -> Iterator[Cell]:
        """Yield one cell per combination of noise, length and initial rate, in this order.

        Args:
            settings: Settings of the search.
            noises: Standard deviations of single losses, in nats.
            lengths: Factors on the lengths of windows or races.
            initial: Initial rates relative to the best fixed rate.
            seeds: One run per seed and combination.

        Raises:
            ValueError: If the search does not fit in the run with its own lengths.
        """
        warmup, points = warmup_iters(self.train_iters), len(self._factors)
        plan = settings.resolve(self.train_iters, warmup)
        for noise in noises:
            surface = replace(self.surface, noise=noise).in_blocks(self.block)
            simulation = Simulation(surface, self._factors, warmup // self.block)
            for factor in lengths:
                steps = [round(factor * length) for length in lengths_in_steps(settings, plan).values()]
                cell = Cell(settings.mode, noise, factor, "+".join(map(str, steps)), 0.0)
                try:
                    scaled = self._scaled(settings, plan, factor)
                    scaled.resolve(points, warmup // self.block)
                except ValueError:
                    yield from (replace(cell, initial=ratio) for ratio in initial)
                    continue
                for ratio in initial:
                    outcomes = [simulation.run(scaled, ratio, seed) for seed in seeds]
                    yield _mean(replace(cell, initial=ratio), outcomes)

    def _scaled(self, settings: AdaLRSSettings, plan: SearchPlan | RacePlan, factor: float) -> AdaLRSSettings:
        if factor == self.block == 1:
            return settings
        return with_lengths(settings, plan, factor / self.block)


def _mean(cell: Cell, outcomes: Sequence[Outcome]) -> Cell:
    return replace(
        cell,
        within_two=fmean(one.within_two for one in outcomes),
        found=geometric_mean(one.found for one in outcomes),
        excess=fmean(one.excess for one in outcomes),
        worst=max(one.excess for one in outcomes),
        gained=fmean(one.gained for one in outcomes),
        discarded=fmean(one.discarded for one in outcomes),
    )
