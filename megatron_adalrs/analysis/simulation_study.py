"""Simulated runs by noise, lengths and initial rate."""

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
    """Means over the runs of one kind. `within_two` and so on are None where the search does not fit in the
    run."""

    mode: str
    noise: float
    length: float
    steps: str
    """The lengths in steps, for people."""
    initial: float
    within_two: float | None = None
    """Share of runs that ended within a factor of 2 of the best fixed rate."""
    found: float | None = None
    """Geometric mean of what they ended with, in parts of it."""
    excess: float | None = None
    """Final loss above the best fixed rate's, nats."""
    worst: float | None = None
    gained: float | None = None
    """Final loss below the same fixed rate's, nats."""
    discarded: float | None = None


def schedule(name: str, train_iters: int) -> list[float]:
    """Factor of the base rate at every step."""
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
    return round(_WARMUP * train_iters)


def surface_of(
    like: Path | None, column: str | None, tag: str | None, schedule_name: str, ratio: float
) -> Surface:
    """The default surface, or one with the noise and descent of a recorded loss.

    Raises:
        OSError, ValueError: the record cannot be read, or nothing can be fitted to it.
    """
    if like is None:
        return Surface()
    log = read_loss_log(like, column, tag)
    # One value a point: the fit is in points, and a point is as good as a mean over its steps.
    fitted = surface_like(log.losses, schedule(schedule_name, len(log.losses)), ratio)
    default = Surface()
    return replace(
        fitted,
        pace=fitted.pace * log.interval,
        noise=fitted.noise * math.sqrt(log.interval),
        cooling=default.cooling,
    )


class Study:
    """Runs of one length and schedule on one surface with different noise.

    Args:
        block: steps that are simulated as one. Noise, descent and lengths are those of the steps.
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
        """One cell for each combination, in the order given.

        Raises:
            ValueError: the search does not fit in the run whatever the lengths.
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
