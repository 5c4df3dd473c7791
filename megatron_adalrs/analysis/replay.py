"""Replay of a learning-rate search on a recorded loss.

A record has one loss per step. The losses of a trial are only known if the record is that of a search, and
only until the replay takes a different decision. All other trial losses follow an assumption, `Arms`, and
the decisions that depend on it are marked as assumed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_adalrs.adalrs.controller import Controller, build_controller
from megatron_adalrs.adalrs.decision import Decision, Event, InMemoryRun, apply_decision
from megatron_adalrs.adalrs.search_plan import RacePlan, SearchPlan
from megatron_adalrs.adalrs.settings import AdaLRSSettings
from megatron_adalrs.analysis.loss_curve import deviation

Floats = NDArray[np.float64]
UNPAIRED = 0.12
"""Standard deviation of the loss difference of two arms on the same batches, relative to independent losses.

Over the last steps of 19 races in small runs of 800 to 2000 steps it was 0.05 to 0.18, and more in shorter
runs.
"""
_NOISE_STEPS = 80
_VERDICTS = (Event.ACCEPTED, Event.NEUTRAL, Event.FAILED, Event.ABORTED)


class Arms(str, Enum):
    """Assumed losses of trials, and of restarts from the initial weights, that are not on record."""

    EQUAL = "equal"
    """Every arm has the recorded losses; a restart runs to its end and loses.

    In a race, the pair noise is alternately added and subtracted: the gain is 0, and the verdict shows the
    gain that would have been required.
    """
    BETTER = "better"
    """The trial of a race gains as much as the loss has fallen so far, which every verdict accepts."""
    WORSE = "worse"
    """The trial of a race, or a restart, is far above the recorded loss and ends as early as possible."""


class Executed(NamedTuple):
    """An executed step of a run with a search."""

    step: int
    """Number of kept steps, including this one."""
    scale: float
    loss: float
    applied: bool
    total_steps: int
    phase: str


@dataclass(frozen=True)
class Replayed:
    """A decision of a replay, and whether it is based on the record."""

    decision: Decision
    total_steps: int
    """Number of steps executed before the decision."""
    recorded: bool
    """Whether every loss behind this and all earlier decisions was recorded at these weights and rates."""
    noise: float
    """Standard deviation of single losses in the steps before the decision; NaN if there are too few."""


@dataclass(frozen=True)
class Replay:
    """Result of a replay."""

    settings: AdaLRSSettings
    plan: SearchPlan | RacePlan
    decisions: tuple[Replayed, ...]
    scale: float
    discarded: int
    finished: bool
    """Whether the record extends to the end of the search."""

    def of(self, *events: Event) -> list[Replayed]:
        """Return the decisions with one of the given events."""
        return [one for one in self.decisions if one.decision.event in events]


def replay(
    settings: AdaLRSSettings,
    train_iters: int,
    losses: ArrayLike,
    *,
    warmup_iters: int = 0,
    arms: Arms = Arms.EQUAL,
    unpaired: float = UNPAIRED,
    executed: Sequence[Executed] = (),
    interruptions: Collection[int] = (),
) -> Replay:
    """Run the search that the settings define on a recorded loss.

    Args:
        settings: Settings of the search.
        train_iters: Number of training steps of the run.
        losses: One loss per step from the first step on, NaN where none was recorded. A record that is
            shorter than the search is replayed to its end.
        warmup_iters: Number of warm-up steps.
        arms: Assumption about trial losses that are not on record.
        unpaired: Relative noise of the difference of two arms; see `UNPAIRED`.
        executed: Steps of a recorded run with a search, in the order of execution. They are used as long as
            step and scale equal those of the replay.
        interruptions: Numbers of executed steps after which the recorded run was interrupted and resumed.

    Raises:
        ValueError: If the search is off or does not fit in the run.
    """
    if not settings.is_on:
        raise ValueError("adalrs.mode=off: there is no search to replay")
    plan = settings.resolve(train_iters, warmup_iters)
    controller = build_controller(settings, train_iters, warmup_iters)
    record = _Record(controller, np.asarray(losses, dtype=np.float64), arms, unpaired, executed, settings)
    decisions: list[Replayed] = []
    run = InMemoryRun(0)  # the state is the number of kept steps
    total = discarded = 0

    def take(decision: Decision, recorded: bool) -> None:
        nonlocal discarded
        if decision.event is not None:
            apply_decision(decision, run)
            discarded += decision.discarded_steps
            decisions.append(Replayed(decision, total, recorded, record.noise_before(decision)))

    take(controller.resume(), True)
    while controller.phase != "done" and run.state + controller.schedule_offset < train_iters:
        seen = record.next(run.state, total)
        if seen is None:
            break
        run.state += 1
        total += 1
        decision = controller.observe(*seen)
        take(decision, record.is_recorded)
        record.notice(decision)
        if record.follows and total in interruptions:
            take(controller.interrupt(), True)
            take(controller.resume(), True)
    return Replay(settings, plan, tuple(decisions), controller.scale, discarded, controller.phase == "done")


class _Record:
    """Source of the losses of a replay, which tracks whether they are recorded or assumed."""

    def __init__(
        self,
        controller: Controller,
        losses: Floats,
        arms: Arms,
        unpaired: float,
        executed: Sequence[Executed],
        settings: AdaLRSSettings,
    ) -> None:
        self._controller, self._losses, self._arms, self._executed = controller, losses, arms, executed
        self._unpaired, self._settings, self._scale = unpaired, settings, controller.scale
        finite = losses[np.isfinite(losses)]
        self._far = float(np.ptp(finite)) + 1.0 if len(finite) else 1.0
        self._pair = 0.0
        self._caught_up = False
        self._has_diverged = False  # whether the weights of the replay differ from those of the record
        self._has_assumed = False  # whether a loss since the last decision was assumed
        self.follows = bool(executed)
        """Whether the replay still follows the executed steps of a recorded search."""

    @property
    def is_recorded(self) -> bool:
        """Whether all losses since the last decision were recorded at the weights of the replay."""
        return not (self._has_diverged or self._has_assumed)

    def next(self, step: int, total: int) -> tuple[float, bool] | None:
        """Return the loss of the next step and whether it was applied, or None at the end of the record."""
        scale, phase = self._controller.scale, self._controller.phase
        if self.follows:
            if total >= len(self._executed):
                return None
            row = self._executed[total]
            if (row.step, row.scale) == (step + 1, scale):
                return row.loss, row.applied
            self.follows, self._has_diverged = False, True
        if step >= len(self._losses):
            return None
        in_arm = phase.endswith(("trial", "restart"))
        self._has_assumed = self._has_assumed or in_arm or scale != self._scale
        offset = self._assumed_offset(step) if in_arm and self._settings.mode == "robust" else 0.0
        return float(self._losses[step]) + offset, True

    def notice(self, decision: Decision) -> None:
        """Update the state after a decision: an undone trial returns to the weights of the record."""
        if self.follows or decision.event is None:
            return
        self._has_assumed = False
        if decision.event in (Event.CAUGHT_UP, Event.TRIAL_STARTED):
            self._caught_up = decision.event is Event.CAUGHT_UP
            self._pair = self._unpaired * math.sqrt(2) * (_positive(self.noise_before(decision)))
        undone = (
            decision.event in (Event.NEUTRAL, Event.FAILED, Event.ABORTED) and decision.restore is not None
        )
        is_cut = self._settings.mode == "paper" and decision.scale_after != self._scale
        if decision.event is not Event.TRIAL_STARTED and (
            is_cut or (decision.event in _VERDICTS and not undone)
        ):
            self._has_diverged = True

    def noise_before(self, decision: Decision) -> float:
        """Return the standard deviation of single losses in the steps before a decision, in nats."""
        last = decision.step or 0
        return deviation(self._losses[max(0, last - _NOISE_STEPS) : last], _NOISE_STEPS // 4)

    def _assumed_offset(self, step: int) -> float:
        """Return the assumed difference of a trial or restart from the recorded loss, in nats."""
        if self._arms is Arms.WORSE or self._caught_up:
            return self._far
        pair = self._pair if step % 2 else -self._pair
        if self._arms is Arms.EQUAL:
            return pair
        seen = self._losses[: step + 1]
        fallen = float(np.ptp(seen[np.isfinite(seen)])) if np.isfinite(seen).any() else 0.0
        return pair - max(fallen, 2 * self._settings.confidence * self._pair)


def _positive(noise: float) -> float:
    """Return the noise, or a tiny value if it is 0 or unknown, so that the standard error is defined."""
    return noise if noise > 0 else 1e-9


def unpaired_share(executed: Sequence[Executed]) -> float:
    """Return the median of `UNPAIRED` over the recorded races, or NaN if no race ran to its end."""
    arms: list[list[Executed]] = []
    for row in executed:
        follows = arms and row.phase == arms[-1][-1].phase and row.step == arms[-1][-1].step + 1
        if follows:
            arms[-1].append(row)
        else:
            arms.append([row])
    shares = []
    for control, trial in pairwise(arms):
        if (control[0].phase, trial[0].phase) != ("control", "trial") or control[0].step != trial[0].step:
            continue
        # Only the losses of arms that end at the same rate differ by nothing but noise.
        if len(control) == len(trial) >= 16 and control[-1].scale == trial[-1].scale:
            losses = np.array([[row.loss for row in arm] for arm in (control, trial)])
            late = losses[:, -(len(control) * 3 // 10) :]
            noise = deviation(losses[0], len(control))
            shares.append(float(np.std(late[0] - late[1], ddof=1)) / (math.sqrt(2) * noise))
    return float(np.nanmedian(shares)) if shares else math.nan


def differences(decisions: Sequence[Replayed], journal: Sequence[Any]) -> str | None:
    """Return the first difference between the recorded decisions of a replay and a run's journal.

    Args:
        decisions: Decisions of the replay.
        journal: Records with event, step and scale_after, such as `DecisionRecord`.

    Returns:
        A description of the difference, or None if there is none.
    """
    mine = [one.decision for one in decisions if one.recorded]
    for number, (one, other) in enumerate(zip(mine, journal, strict=False), start=1):
        event = one.event.value if one.event else ""
        if (event, one.step, one.scale_after) != (other.event, other.step, other.scale_after):
            return (
                f"decision {number} is {event} at step {one.step}, "
                f"but {other.event} at step {other.step} in the journal"
            )
    return None
