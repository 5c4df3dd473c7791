"""Simulation of training runs on a model of the loss whose best rate is known.

The controllers are those of real runs. The rate enters as its ratio q = schedule * scale * initial / best to
the rate of fastest descent. The state consists of the progress u (in steps at that rate), the heat h and the
harm d. Before step t, the loss in nats is

    L = floor + drop (1 + u / pace)^-exponent + heat h + damage (1 - exp(-d)) + noise (z_t + unpaired y_n)

and the step updates the state by

    u += g(q),  g(q) = 2 q / (1 + q^2)
    h += cooling (sqrt(q) - h)
    d += harm max(0, q / critical - 1)

-ln g = ln cosh(ln q) is convex in the log rate and 0 at q = 1. The heat raises the loss as long as the rate
is high, so lowering the rate helps at once. The harm of a rate that is far too high is permanent. z and y are
standard normal: z depends on the batch and is equal in both arms of a race; y depends on the execution of the
step, which n counts, and differs between the arms.

The model contains the difficulties of a search: the U-shape of the loss in the log rate, the natural slowdown
(descent is a power law), the short-term benefit of lower rates, and permanent damage. It has no other
properties of real runs and is no evidence about them. In runs of 2000 steps of a GPT with 40 thousand
parameters, fixed rates of 1/30 and 1/10 of the best one descended about 1/19 and 1/5 as fast (g: 1/15 and
1/5) and ended 0.66 and 0.43 nats above it; rates of 10 and 30 times the best one ended 0.33 and 0.56 nats
above it (with the default parameters: 0.87, 0.30, 0.33 and 0.54). Loss differences of two arms on the same
batches had 0.05 to 0.18 times the standard deviation of independent losses. `surface_like` estimates noise
and descent from a record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_adalrs.adalrs.controller import build_controller, schedule_step
from megatron_adalrs.adalrs.decision import InMemoryRun, apply_decision
from megatron_adalrs.adalrs.settings import AdaLRSSettings
from megatron_adalrs.analysis.loss_curve import deviation, fit_descent

_RATIOS = np.geomspace(1e-3, 1e3, 241)  # in steps of 5.9 %
_CLIFF = 0.03
Ratio = TypeVar("Ratio", float, NDArray[np.float64])
"""Ratio of learning rates, a number or an array."""


class State(NamedTuple):
    """State of a simulated run."""

    step: int = 0
    progress: float = 0.0
    heat: float = 0.0
    harm: float = 0.0


@dataclass(frozen=True)
class Surface:
    """Parameters of the model that the module describes; losses are in nats."""

    floor: float = 1.7
    drop: float = 3.8
    pace: float = 20.0
    """Steps at the best rate after which the descent becomes a power law."""
    exponent: float = 1.0
    heat: float = 0.2
    cooling: float = 0.05
    """Fraction of the difference to its stationary value by which the heat changes in a step."""
    damage: float = 0.2
    critical: float = 4.0
    harm: float = 0.01
    noise: float = 0.17
    """Standard deviation of the loss of one step."""
    unpaired: float = 0.12
    """Noise that does not depend on the batch, relative to `noise`."""

    def descent(self, ratio: Ratio) -> Ratio:
        """Return the progress g(q) of a step."""
        return 2 * ratio / (1 + ratio * ratio)

    def harmed(self, ratio: Ratio) -> Ratio:
        """Return the increase of the harm d in a step."""
        return self.harm * (ratio > self.critical) * (ratio / self.critical - 1)

    def level(self, progress: float, heat: float, harm: float) -> float:
        """Return the loss without noise."""
        left: float = self.drop * (1 + progress / self.pace) ** -self.exponent
        return self.floor + left + self.heat * heat + (self.damage * (1 - math.exp(-harm)) if harm else 0.0)

    def stepped(self, state: State, ratio: float) -> State:
        """Return the state after one more step."""
        step, progress, heat, harm = state
        return State(
            step + 1,
            progress + self.descent(ratio),
            heat + self.cooling * (math.sqrt(ratio) - heat),
            harm + self.harmed(ratio),
        )

    def in_blocks(self, steps: int) -> Surface:
        """Return the surface on which a step stands for a block of steps.

        The loss of a block is the mean of its steps' losses, and its rate is that of the first step.
        """
        return replace(
            self,
            pace=self.pace / steps,
            cooling=1 - (1 - self.cooling) ** steps,
            harm=self.harm * steps,
            noise=self.noise / math.sqrt(steps),
        )

    def at_the_end(self, state: State, ratios: NDArray[np.float64]) -> float:
        """Return the loss without noise after steps at these ratios, computed in closed form."""
        kept = (1 - self.cooling) ** np.arange(len(ratios) - 1, -1, -1)
        heat = state.heat * (1 - self.cooling) ** len(ratios) + self.cooling * float(np.sqrt(ratios) @ kept)
        progress = state.progress + float(self.descent(ratios).sum())
        return self.level(progress, heat, state.harm + float(self.harmed(ratios).sum()))


@dataclass(frozen=True)
class Outcome:
    """Result of a simulated run.

    Rates are relative to the best fixed rate: the one with the lowest final loss on the same schedule.
    """

    initial: float
    """Initial base rate."""
    found: float
    """Base rate at the end of the search."""
    excess: float
    """Final loss without noise minus that of the best fixed rate, in nats."""
    gained: float
    """Final loss of the fixed initial rate minus final loss of the run, in nats."""
    discarded: float
    """Discarded steps as a fraction of train_iters."""

    @property
    def within_two(self) -> bool:
        """Whether the search ended within a factor of 2 of the best rate."""
        return 0.5 <= self.found <= 2.0


class Simulation:
    """Simulated runs of one length and schedule on one surface.

    Args:
        surface: Model of the loss.
        schedule: Factor on the base rate at every step of a run.
        warmup_iters: Number of warm-up steps, in which no search may begin.
    """

    def __init__(self, surface: Surface, schedule: Sequence[float], warmup_iters: int = 0) -> None:
        self.surface, self.warmup_iters = surface, warmup_iters
        self._factors = np.asarray(schedule, dtype=np.float64)
        self._schedule = self._factors.tolist()
        finals = [self.fixed(ratio) for ratio in _RATIOS]
        self.best_ratio = float(_RATIOS[int(np.argmin(finals))])
        """Fixed base rate with the lowest final loss, relative to the rate of fastest descent."""
        self.best_loss = min(finals)

    def fixed(self, ratio: float) -> float:
        """Return the final loss without noise of a fixed base rate.

        Args:
            ratio: Base rate relative to the rate of fastest descent.
        """
        return self.surface.at_the_end(State(), ratio * self._factors)

    def run(self, settings: AdaLRSSettings, initial: float, seed: int) -> Outcome:
        """Simulate one run with a search.

        Args:
            settings: Settings of the search.
            initial: Initial base rate relative to the best fixed rate.
            seed: Seed of the noise.

        Raises:
            ValueError: If the search does not fit in the run.
        """
        surface, schedule, length = self.surface, self._schedule, len(self._schedule)
        controller = build_controller(settings, length, self.warmup_iters)
        base, random = initial * self.best_ratio, np.random.default_rng(seed)
        of_batch = (surface.noise * random.standard_normal(length)).tolist()
        of_execution = (surface.noise * surface.unpaired * random.standard_normal(4 * length)).tolist()
        run = InMemoryRun(State())
        executed = discarded = 0
        apply_decision(controller.resume(), run)
        while controller.phase not in ("done", "fixed"):
            state = run.state
            if state.step + controller.schedule_offset >= length:
                break
            ratio = (
                schedule[schedule_step(controller, state.step, self.warmup_iters)] * controller.scale * base
            )
            loss = surface.level(state.progress, state.heat, state.harm)
            loss += of_batch[state.step] + of_execution[executed % len(of_execution)]
            run.state = surface.stepped(state, ratio)
            executed += 1
            decision = controller.observe(loss)
            if decision.event is not None:
                discarded += decision.discarded_steps
                apply_decision(decision, run)
        rest = self._factors[run.state.step + controller.schedule_offset :] * (controller.scale * base)
        final = surface.at_the_end(run.state, rest)
        return Outcome(
            initial=initial,
            found=initial * controller.scale,
            excess=final - self.best_loss,
            gained=self.fixed(base) - final,
            discarded=discarded / length,
        )


def surface_like(losses: ArrayLike, schedule: Sequence[float], ratio: float = 1.0) -> Surface:
    """Return a surface with the noise and descent of a recorded loss, and defaults for all other parameters.

    The first 3 % of the record are ignored, because the steep initial decrease does not follow the power law
    of later steps. The floor of the loss is an extrapolation, so the fit says little about much longer runs.

    Args:
        losses: One loss per step, NaN where none was recorded.
        schedule: Factor on the base rate at every recorded step.
        ratio: Base rate of the recorded run relative to the rate of fastest descent; it cannot be estimated
            from one record.

    Raises:
        ValueError: If the record is too short, or the loss does not fall.
    """
    surface, values = Surface(), np.array(losses, dtype=np.float64)
    ratios = ratio * np.asarray(schedule, dtype=np.float64)
    progress = np.cumsum(surface.descent(ratios)) - surface.descent(ratios)
    state, warmth = State(), []
    for one in ratios.tolist():
        warmth.append(state.heat)
        state = surface.stepped(state, one)
    values[: round(_CLIFF * len(values))] = math.nan
    noise = deviation(values[len(values) // 10 :])
    return replace(surface, **fit_descent(values, progress, warmth)._asdict(), noise=noise)
