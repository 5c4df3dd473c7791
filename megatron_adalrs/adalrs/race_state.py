"""What a controller of races keeps from step to step, how it is saved, interrupted and resumed, and its
words."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any, Literal

from megatron_adalrs.adalrs import race_statistics as paired
from megatron_adalrs.adalrs.decision import Decision, Event
from megatron_adalrs.adalrs.race_statistics import Gain
from megatron_adalrs.adalrs.search_plan import RacePlan
from megatron_adalrs.adalrs.settings import AdaLRSSettings, check_same_search

Phase = Literal["before", "control", "trial", "restart-control", "restart", "ending", "done"]
INITIAL = "initial"
"""Name of the snapshot of the weights before the first step."""
_STATE = (
    "step",
    "schedule_offset",
    "phase",
    "scale",
    "_executed",
    "_spent",
    "_spent_at_start",
    "_index",
    "_start",
    "_base",
    "_factor",
    "_may_climb",
    "_restart_may_come",
    "_has_fallback",
    "_only_fallback",
    "_accounted",
    "_slots",
    "_opening",
    "_control",
    "_trial",
)


class RaceState:
    """State, moves and words of `RobustController`, which has the rules."""

    def __init__(self, settings: AdaLRSSettings, plan: RacePlan) -> None:
        self.settings = settings
        self.plan = plan
        self.step = 0
        self.schedule_offset = 0
        self.phase: Phase = "before"
        self._executed = 0
        self._spent = (
            0  # executed, less what interruptions made the run repeat: a run without any has the same
        )
        self._spent_at_start = 0  # at A
        self._index = 0  # steps taken in the arm under way
        self._start = 0  # A's step
        self._base = 1.0  # A's scale
        self._factor = settings.alpha
        self._may_climb = True  # no race of the climb was lost at this scale
        self._restart_may_come = (
            True  # until one is run, save an early one lost by little, or a rate raised, or kept
        )
        self._has_fallback = False  # whether a lost restart race goes back to B, not to A
        self._only_fallback = (
            False  # whether the control under way is to make B anew for an interrupted restart race
        )
        self._accounted = 0  # discarded steps that decisions have told of
        self._slots = {
            "start": "first",
            "control": "second",
            "winner": "third",
        }  # snapshots A and B, and a restart's
        self._opening: list[float | None] = []  # losses of the kept steps up to the search's start
        self._control: list[float | None] = []
        self._spread: float | None = None  # of the control, once a trial has asked for it
        self._trial: list[float | None] = []
        self._set_scale(1.0)

    def state_dict(self) -> dict[str, Any]:
        """The whole state and the settings it belongs to; Python's json writes and reads it back exactly."""
        state = {name.lstrip("_"): copy.copy(getattr(self, name)) for name in _STATE}
        return {"mode": "robust", "settings": asdict(self.settings), "plan": asdict(self.plan)} | state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned.

        Raises:
            ValueError: the state is from a run with other settings, or lacks an entry; nothing has changed.
        """
        check_same_search(state, self.settings, self.plan, entries=self.state_dict())
        for name in _STATE:
            setattr(self, name, copy.copy(state[name.lstrip("_")]))
        self._spread = None
        self._set_scale(self.scale)

    @property
    def has_pending_rollback(self) -> bool:
        """Whether steps were taken that the race under way may undo, or set aside that may come back."""
        if self.phase == "restart-control":
            return self._has_fallback or self._index > 0
        return self.phase in ("trial", "restart") or (self.phase == "control" and self._index > 0)

    @property
    def needs_initial(self) -> bool:
        """Whether a restart race may still come, which begins from the snapshot `INITIAL`."""
        # A trial that ends early may leave more of the budget than there seems to be while it lasts.
        is_affordable = self.phase == "trial" or self._may_restart(self._base)
        may_come = self._restart_may_come and self.phase not in ("ending", "done") and is_affordable
        return may_come or self._only_fallback or self.phase in ("restart-control", "restart")

    def interrupt(self) -> Decision:
        """Go back to where the race under way began, so that the run can be saved; `resume` runs it anew."""
        if not self.has_pending_rollback:
            return self._keep
        if self.phase in ("restart-control", "restart") and not self._has_fallback:
            self._enter_restart_control()
        else:
            self._only_fallback = self._only_fallback or self.phase in ("restart-control", "restart")
            self._enter("control", self._start, self._base)
        self._spent = self._spent_at_start
        reason = f"interrupted within a race: back to its start at step {self.step}"
        return self._verdict(Event.INTERRUPTED, self.scale, reason, restore=self._slots["start"])

    def resume(self) -> Decision:
        """What to do before a process's first step: keep the initial weights, or begin the race under way.

        Raises:
            RuntimeError: the state is from within a race, whose snapshots ended with its process.
        """
        if self.has_pending_rollback:
            raise RuntimeError(
                "the state was saved within a race, whose snapshots are gone: call interrupt() first"
            )
        if self.step == 0 and self.needs_initial:
            return self._tell(
                Event.INITIAL_KEPT, "the initial weights are kept, for a restart", capture=INITIAL
            )
        if self.phase in ("control", "restart-control"):
            return self._tell(Event.CONTROL_STARTED, self._what_follows(), capture=self._slots["start"])
        return self._keep

    @property
    def _in_climb(self) -> bool:
        """Whether the race under way is one of the climb."""
        return self._start < self.plan.search_start

    @property
    def _arm_steps(self) -> int:
        return self.plan.climb_steps if self._in_climb else self.plan.race_steps

    @property
    def _tried_factor(self) -> float:
        return self.settings.alpha if self._in_climb else self._factor

    def _spread_of_control(self) -> float:
        if self._spread is None:
            self._spread = paired.spread(self._control)
        return self._spread

    # Moves

    def _enter(self, phase: Phase, step: int, scale: float) -> None:
        """Begin an arm: from this kept step, at this scale."""
        self.phase, self.step, self._index, self._trial = phase, step, 0, []
        if phase in ("control", "restart-control"):
            self._control, self._spread = [], None
        self._set_scale(scale)

    def _enter_restart_control(self) -> None:
        """The steps from A on at the lower scale, with which a new run will be compared."""
        self._enter("restart-control", self._start, self._base / self.settings.restart_factor)

    def _affords(self, steps: int) -> bool:
        return self.settings.affords(self._spent - self.step + steps, self.plan.train_iters)

    def _may_restart(self, scale: float) -> bool:
        """Whether there may be a restart at the next scale below this one."""
        in_budget = (
            self.settings.budget == "kept" or self._spent + self.plan.restart_cost <= self.plan.train_iters
        )
        in_range = self.settings.min_scale <= scale / self.settings.restart_factor
        return in_range and in_budget and self._affords(self.plan.restart_cost)

    def _swap(self, one: str, other: str) -> None:
        self._slots[one], self._slots[other] = self._slots[other], self._slots[one]

    def _set_scale(self, scale: float) -> None:
        self.scale = scale
        self._keep = Decision(scale_before=scale, scale_after=scale)

    # Words

    def _what_follows(self) -> str:
        if self.phase == "restart-control":
            return f"{self.plan.restart_steps} steps at scale {self.scale:.4g}, to compare a new run with"
        if self._only_fallback:
            return f"{self.plan.race_steps} steps at scale {self.scale:.4g}, to go back to"
        higher = self.scale * self._tried_factor
        return f"{self._arm_steps} steps at scale {self.scale:.4g}, to race {higher:.4g} against"

    def _then(self) -> str:
        return "" if self.phase in ("before", "ending") else f"; next {self._what_follows()}"

    def _tell(self, event: Event, reason: str, scale_before: float | None = None, **rest: Any) -> Decision:
        before = self.scale if scale_before is None else scale_before
        return Decision(
            event=event, step=self.step, scale_before=before, scale_after=self.scale, reason=reason, **rest
        )

    def _verdict(
        self,
        event: Event,
        before: float,
        reason: str,
        gain: Gain | None = None,
        undone: int | None = None,
        **snapshots: str | None,
    ) -> Decision:
        """A decision that discards steps: `undone` of them, or all that were executed, not kept and not yet
        told."""
        if undone is None:
            undone = self._executed - self.step - self._accounted
        self._accounted += undone
        numbers = {"gain": gain.mean, "gain_error": gain.error, "threshold": gain.threshold} if gain else {}
        return self._tell(event, reason, before, discarded_steps=undone, **numbers, **snapshots)
