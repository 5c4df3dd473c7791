"""The decisions a controller would take on a recorded loss.

A record has one loss a step. What a trial would have shown is not on it, except where it is the record of a
search, and only for as long as the same decisions are taken. Everything beyond is an assumption, `Arms`, and
is marked as such.
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
"""Standard deviation of the difference of two arms on the same batches, in parts of what independent losses
would give it. Over the last steps of 19 races in small runs of 800 to 2000 steps it was 0.05 to 0.18; more in
shorter runs."""
_NOISE_STEPS = 80
_VERDICTS = (Event.ACCEPTED, Event.NEUTRAL, Event.FAILED, Event.ABORTED)


class Arms(str, Enum):
    """What a trial, or a new run from the initial weights, is taken to show where there is no record of
    it."""

    EQUAL = "equal"
    """The recorded loss of its steps. In a race, give or take the noise of a pair, half of it above and half
    below: the gain is 0, and the verdict tells what it would have had to be. A new run is run to its end and
        is not as good."""
    BETTER = "better"
    """A race's trial gains as much as the loss has fallen by, which is more than any needs."""
    WORSE = "worse"
    """A race's trial, and a new run, are far above the recorded loss: they end as early as they can."""


class Executed(NamedTuple):
    """One executed step of a run with a search."""

    step: int
    """Kept steps, this one included."""
    scale: float
    loss: float
    applied: bool
    total_steps: int
    phase: str


@dataclass(frozen=True)
class Replayed:
    """A decision and how far it rests on the record."""

    decision: Decision
    total_steps: int
    """Steps executed by then."""
    recorded: bool
    """Whether every loss that it and those before it depend on is of these weights, at this rate."""
    noise: float
    """Standard deviation of single recorded losses about a line, in the steps up to it; nan where there are
    few."""


@dataclass(frozen=True)
class Replay:
    """What a search would have done."""

    settings: AdaLRSSettings
    plan: SearchPlan | RacePlan
    decisions: tuple[Replayed, ...]
    scale: float
    discarded: int
    finished: bool
    """Whether the record reaches to the search's end."""

    def of(self, *events: Event) -> list[Replayed]:
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
    """Drive the controller that the settings ask for along a record.

    Args:
        losses: one a step from the first on, not finite where there is none. A record shorter than the search
            is replayed as far as it goes.
        arms: what trials show; see `Arms`.
        unpaired: see `UNPAIRED`.
        executed: the steps of a run with a search, in the order of execution. They are used for as long as
            the controller asks for the step and the scale that come next.
        interruptions: numbers of executed steps after which that run was interrupted and resumed.

    Raises:
        ValueError: the search does not fit in the run, or is not enabled.
    """
    if not settings.enabled:
        raise ValueError("adalrs.enabled=False: there is no search to replay")
    plan = settings.resolve(train_iters, warmup_iters)
    controller = build_controller(settings, train_iters, warmup_iters)
    record = _Record(controller, np.asarray(losses, dtype=np.float64), arms, unpaired, executed, settings)
    decisions: list[Replayed] = []
    run = InMemoryRun(0)  # its state is the number of kept steps
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
        take(decision, record.is_literal)
        record.notice(decision)
        if record.follows and total in interruptions:
            take(controller.interrupt(), True)
            take(controller.resume(), True)
    return Replay(settings, plan, tuple(decisions), controller.scale, discarded, controller.phase == "done")


class _Record:
    """Hands out the losses that a controller asks for, and keeps track of what they are worth."""

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
        self._is_spoilt = False  # whether the weights, as the replay has them, are not those on record
        self._guessed = False  # whether a loss since the last decision was none of the record's
        self.follows = bool(executed)
        """Whether the record of a search is followed, step by step."""

    @property
    def is_literal(self) -> bool:
        return not (self._is_spoilt or self._guessed)

    def next(self, step: int, total: int) -> tuple[float, bool] | None:
        """The loss of the next step and whether it was applied; None where the record ends."""
        scale, phase = self._controller.scale, self._controller.phase
        if self.follows:
            if total >= len(self._executed):
                return None
            row = self._executed[total]
            if (row.step, row.scale) == (step + 1, scale):
                return row.loss, row.applied
            self.follows, self._is_spoilt = False, True
        if step >= len(self._losses):
            return None
        in_arm = phase.endswith(("trial", "restart"))
        self._guessed = self._guessed or in_arm or scale != self._scale
        beyond = self._beyond(step) if in_arm and self._settings.mode == "robust" else 0.0
        return float(self._losses[step]) + beyond, True

    def notice(self, decision: Decision) -> None:
        """A decision was carried out: after a trial that is undone the record is of these weights again."""
        if self.follows or decision.event is None:
            return
        self._guessed = False
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
            self._is_spoilt = True

    def noise_before(self, decision: Decision) -> float:
        last = decision.step or 0
        return deviation(self._losses[max(0, last - _NOISE_STEPS) : last], _NOISE_STEPS // 4)

    def _beyond(self, step: int) -> float:
        """What a race's trial or a new run has above the recorded loss."""
        if self._arms is Arms.WORSE or self._caught_up:
            return self._far
        pair = self._pair if step % 2 else -self._pair
        if self._arms is Arms.EQUAL:
            return pair
        seen = self._losses[: step + 1]
        fallen = float(np.ptp(seen[np.isfinite(seen)])) if np.isfinite(seen).any() else 0.0
        return pair - max(fallen, 2 * self._settings.confidence * self._pair)


def _positive(noise: float) -> float:
    """Arms that agree exactly have no standard error; nor have those of a record too short to have any."""
    return noise if noise > 0 else 1e-9


def unpaired_share(executed: Sequence[Executed]) -> float:
    """`UNPAIRED` as the races on record have it, the median; nan where there is none that ran to its end."""
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
        # Only arms that end at the same rate differ by noise alone.
        if len(control) == len(trial) >= 16 and control[-1].scale == trial[-1].scale:
            losses = np.array([[row.loss for row in arm] for arm in (control, trial)])
            late = losses[:, -(len(control) * 3 // 10) :]
            noise = deviation(losses[0], len(control))
            shares.append(float(np.std(late[0] - late[1], ddof=1)) / (math.sqrt(2) * noise))
    return float(np.nanmedian(shares)) if shares else math.nan


def differences(decisions: Sequence[Replayed], journal: Sequence[Any]) -> str | None:
    """The first way in which the recorded part of a replay and a run's journal differ; None where they agree.

    Args:
        journal: records with event, step and scale_after, such as `DecisionRecord`.
    """
    mine = [one.decision for one in decisions if one.recorded]
    for number, (one, other) in enumerate(zip(mine, journal, strict=False), start=1):
        event = one.event.value if one.event else ""
        if (event, one.step, one.scale_after) != (other.event, other.step, other.scale_after):
            return (
                f"decision {number} is {event} at step {one.step}, in the journal {other.event} at "
                f"{other.step}"
            )
    return None
