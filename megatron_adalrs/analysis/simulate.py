"""Training runs on a loss surface whose best rate is known: the real controllers, thousands of runs a minute.

The rate enters as its ratio q = schedule x scale x initial / best to the rate of fastest descent. State:
progress u (in steps at that rate), heat h, harm d. Before step t the loss in nats, and what the step does,
are

    L = floor + drop (1 + u / pace)^-exponent + heat h + damage (1 - exp(-d)) + noise (z_t + unpaired y_n)
    u += g(q),  g(q) = 2 q / (1 + q^2)      -ln g = ln cosh(ln q) is convex in the log rate, 0 at q = 1
    h += cooling (sqrt(q) - h)              a high rate holds the loss up while it lasts; lowering it pays at
    once d += harm max(0, q / critical - 1)      what far too high a rate did stays, whatever comes after it

z and y are standard normal. z belongs to the batch, so that both arms of a race see the same; y to the
execution of the step (n counts them), so that no two arms agree exactly.

This is a model, chosen because it has what the searches have to cope with: the U-shape in the log rate,
natural slowdown (descent is a power law), the annealing illusion, lasting damage. It is no evidence about
real runs: nothing else of them is in it. On a GPT of 40 thousand parameters, 2000 steps, fixed rates of 1/30
and 1/10 of the best one descended about 1/19 and 1/5 as fast (g: 1/15 and 1/5) and ended 0.66 and 0.43 nats
above it, rates of 10 and 30 times 0.33 and 0.56 (the defaults: 0.87, 0.30, 0.33, 0.54); differences of two
arms on the same batches had 0.05 to 0.18 of the standard deviation that independent losses would give them.
`surface_like` takes noise and descent from a record.
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

_RATIOS = np.geomspace(1e-3, 1e3, 241)  # 5.9 % apart
_CLIFF = 0.03
Ratio = TypeVar("Ratio", float, NDArray[np.float64])
"""Ratios of learning rates: a number or an array."""


class State(NamedTuple):
    """What a snapshot holds."""

    step: int = 0
    progress: float = 0.0
    heat: float = 0.0
    harm: float = 0.0


@dataclass(frozen=True)
class Surface:
    """The parameters of the model above; losses in nats."""

    floor: float = 1.7
    drop: float = 3.8
    pace: float = 20.0
    """Steps at the best rate after which the descent becomes a power law."""
    exponent: float = 1.0
    heat: float = 0.2
    cooling: float = 0.05
    """Share of the way to its level at the present rate that the heat goes in a step."""
    damage: float = 0.2
    critical: float = 4.0
    harm: float = 0.01
    noise: float = 0.17
    """Standard deviation of one step's loss."""
    unpaired: float = 0.12
    """Part of it that does not belong to the batch."""

    def descent(self, ratio: Ratio) -> Ratio:
        """Return g(q), for a number or an array."""
        return 2 * ratio / (1 + ratio * ratio)

    def harmed(self, ratio: Ratio) -> Ratio:
        """Return what a step adds to d, for a number or an array."""
        return self.harm * (ratio > self.critical) * (ratio / self.critical - 1)

    def level(self, progress: float, heat: float, harm: float) -> float:
        """The loss without noise, for numbers."""
        left: float = self.drop * (1 + progress / self.pace) ** -self.exponent
        return self.floor + left + self.heat * heat + (self.damage * (1 - math.exp(-harm)) if harm else 0.0)

    def stepped(self, state: State, ratio: float) -> State:
        """The state after one more step."""
        step, progress, heat, harm = state
        return State(
            step + 1,
            progress + self.descent(ratio),
            heat + self.cooling * (math.sqrt(ratio) - heat),
            harm + self.harmed(ratio),
        )

    def in_blocks(self, steps: int) -> Surface:
        """The same surface for blocks of so many steps: each has the mean of their losses and the rate of the
        first."""
        return replace(
            self,
            pace=self.pace / steps,
            cooling=1 - (1 - self.cooling) ** steps,
            harm=self.harm * steps,
            noise=self.noise / math.sqrt(steps),
        )

    def at_the_end(self, state: State, ratios: NDArray[np.float64]) -> float:
        """The loss without noise after steps at these ratios, all at once."""
        kept = (1 - self.cooling) ** np.arange(len(ratios) - 1, -1, -1)
        heat = state.heat * (1 - self.cooling) ** len(ratios) + self.cooling * float(np.sqrt(ratios) @ kept)
        progress = state.progress + float(self.descent(ratios).sum())
        return self.level(progress, heat, state.harm + float(self.harmed(ratios).sum()))


@dataclass(frozen=True)
class Outcome:
    """A simulated run. Ratios are to the fixed rate whose final loss is least, on the same schedule."""

    initial: float
    found: float
    """Ratio of the base rate that the search ended with."""
    excess: float
    """Final loss without noise above that of the best fixed rate, in nats."""
    gained: float
    """What it is below that of the initial rate, kept fixed, in nats."""
    discarded: float
    """Steps that verdicts discarded, as a share of train_iters."""

    @property
    def within_two(self) -> bool:
        """Whether the search ended within a factor of 2 of the best rate."""
        return 0.5 <= self.found <= 2.0


class Simulation:
    """Runs of one length and schedule on one surface.

    Args:
        surface: the model.
        schedule: factor of the base rate at every step: the run's length in steps.
        warmup_iters: how many of them are warm-up, in which no search may begin.
    """

    def __init__(self, surface: Surface, schedule: Sequence[float], warmup_iters: int = 0) -> None:
        self.surface, self.warmup_iters = surface, warmup_iters
        self._factors = np.asarray(schedule, dtype=np.float64)
        self._schedule = self._factors.tolist()
        finals = [self.fixed(ratio) for ratio in _RATIOS]
        self.best_ratio = float(_RATIOS[int(np.argmin(finals))])
        """Base rate whose final loss is least, relative to the rate of fastest descent."""
        self.best_loss = min(finals)

    def fixed(self, ratio: float) -> float:
        """Final loss without noise of a fixed base rate, relative to the rate of fastest descent."""
        return self.surface.at_the_end(State(), ratio * self._factors)

    def run(self, settings: AdaLRSSettings, initial: float, seed: int) -> Outcome:
        """One run with a search, from `initial` times the best fixed rate.

        Raises:
            ValueError: the search does not fit in the run.
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
    """A surface whose noise and descent are those of a recorded loss, one value a step; the rest is the
    default's.

    The first 3 % of the record are left out: a loss falls off a cliff there, which is no part of the power
    law that is to say what comes later. How low it can get at all is not on record; the fit says little of
    much longer runs.

    Args:
        losses: the record, not finite where there is none.
        schedule: factor of the base rate at every one of those steps.
        ratio: that run's base rate relative to the rate of fastest descent, which a single record cannot
            tell.

    Raises:
        ValueError: the record is too short, or does not fall.
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
