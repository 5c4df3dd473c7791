"""The paired race: two futures of the same weights on the same batches, judged at the same learning rate.

A pure state machine: a loss in, a decision out. The rule is this project's own. The velocity of a short window is
mostly noise, it falls by itself as training goes on, and a lower rate looks better at first, whatever comes of it.
All three vanish where both arms see the same batches and return to the same rate before they are judged.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, replace
from typing import Any, Literal

from megatron_adalrs.adalrs import paired
from megatron_adalrs.adalrs.decision import Decision, Event
from megatron_adalrs.adalrs.paired import Gain
from megatron_adalrs.adalrs.plans import RacePlan
from megatron_adalrs.adalrs.settings import AdaLRSSettings, check_same_search

INITIAL = "initial"
"""Name of the snapshot of the weights before the first step."""
_LARGEST_LOSS = 1e100  # squares of larger ones overflow
Phase = Literal["before", "control", "trial", "restart-control", "restart", "ending", "done"]
_STATE = (
    "step", "ahead", "phase", "scale", "_executed", "_spent", "_spent_at_start", "_index", "_start", "_base",
    "_factor", "_races", "_has_fallback", "_only_fallback", "_accounted", "_slots", "_opening", "_control", "_trial",
)  # fmt: skip


class RobustController:
    """Races the current rate s against a higher one and, when the first race is lost, a restart at a lower one.

    A race, from snapshot A: the *control* takes `race_steps` steps at s and ends in snapshot B; the *trial*, from A on
    the same batches, takes `trial_steps` at s x f and the `return_steps` that remain at s. With D = control - trial,
    step by step over the last of the return steps:

    - mean(D) > confidence x SE(D): s becomes s x f, and the trial's steps are kept.
    - otherwise B is restored, to the bit as if there had been no trial, and f becomes sqrt(f).
    - a trial that is not finite, or whose last 8 losses lie above the control's by more than the standard deviation of
      those, ends at once and is lost.

    When the very first race is lost the rate may be far too large, and the weights too damaged for a lower rate to mend
    them: the *restart race* compares, at the same low rate s / alpha and on the same batches, `restart_steps` steps
    that go on from A with the end of a new run from the initial weights. If the new run is not worse, it is kept up to
    A's step, s becomes s / alpha, and the restart race is repeated.

    Steps that the optimizer skipped and losses that are not finite take no part in a difference. The state can be saved
    wherever `undecided` is False. The snapshots belong to the trainer.
    """

    def __init__(self, settings: AdaLRSSettings, plan: RacePlan) -> None:
        self.settings = settings
        self.plan = plan
        self.step = 0
        self.ahead = 0
        self.phase: Phase = "before"
        self._executed = 0
        self._spent = 0  # executed, less what interruptions made the run repeat: a run without any has the same
        self._spent_at_start = 0  # at A
        self._index = 0  # steps taken in the arm under way
        self._start = 0  # A's step
        self._base = 1.0  # A's scale
        self._factor = settings.alpha
        self._races = 0  # races decided
        self._has_fallback = False  # whether a lost restart race goes back to B, not to A
        self._only_fallback = False  # whether the control under way is to make B anew for an interrupted restart race
        self._accounted = 0  # discarded steps that decisions have told of
        self._slots = {"start": "first", "control": "second", "winner": "third"}  # snapshots A and B, and a restart's
        self._opening: list[float | None] = []  # losses of the kept steps up to the search's start
        self._control: list[float | None] = []
        self._trial: list[float | None] = []
        self._set_scale(1.0)

    @property
    def undecided(self) -> bool:
        """Whether steps were taken that the race under way may undo, or set aside that may come back."""
        if self.phase == "restart-control":
            return self._has_fallback or self._index > 0
        return self.phase in ("trial", "restart") or (self.phase == "control" and self._index > 0)

    @property
    def needs_initial(self) -> bool:
        """Whether a restart race may still come, which begins from the snapshot `INITIAL`."""
        may_come = self._races == 0 and self.phase not in ("ending", "done") and self._may_restart(self._base)
        return may_come or self._only_fallback or self.phase in ("restart-control", "restart")

    def observe(self, loss: float, applied: bool = True) -> Decision:
        """Count one more step and decide what comes next.

        Args:
            loss: the step's training loss, the same on every rank.
            applied: False when the optimizer skipped the step.
        """
        self.step += 1
        self._executed += 1
        self._spent += 1
        if self.phase == "done":
            return self._keep
        if self.phase == "ending":
            return self._end()
        finite = abs(loss) < _LARGEST_LOSS
        usable = loss if applied and finite else None
        if self.phase == "before":
            self._opening.append(usable)
            return self._first_race() if self.step == self.plan.search_start else self._keep
        self._index += 1
        if self.phase in ("control", "restart-control"):
            self._control.append(usable)
            return self._in_control()
        self._trial.append(usable)
        return self._in_trial(finite) if self.phase == "trial" else self._in_restart(finite)

    def interrupt(self) -> Decision:
        """Go back to where the race under way began, so that the run can be saved; `resume` runs it anew."""
        if not self.undecided:
            return self._keep
        if self.phase in ("restart-control", "restart") and not self._has_fallback:
            self._enter("restart-control", self._start, self._base / self.settings.alpha)
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
        if self.undecided:
            raise RuntimeError("the state was saved within a race, whose snapshots are gone: call interrupt() first")
        if self.step == 0 and self.needs_initial:
            return self._tell(Event.INITIAL_KEPT, "the initial weights are kept, for a restart", capture=INITIAL)
        if self.phase in ("control", "restart-control"):
            return self._tell(Event.CONTROL_STARTED, self._what_follows(), capture=self._slots["start"])
        return self._keep

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
        self._set_scale(self.scale)

    # The race

    def _first_race(self) -> Decision:
        self._begin_race()
        if self.phase == "ending":
            return self._keep
        return self._tell(Event.CONTROL_STARTED, self._what_follows(), capture=self._slots["start"])

    def _begin_race(self) -> None:
        """A race from here and the current scale, if one fits in the search; otherwise the search is over."""
        while self.scale * self._factor > self.settings.max_scale and self._factor >= self.settings.finest_factor:
            self._factor = math.sqrt(self._factor)
        self._has_fallback = False
        self.ahead = self._spent - self.step if self.settings.budget == "total" else 0
        cost = (2 if self.settings.budget == "total" else 1) * self.plan.race_steps
        fits = self.step + self.ahead + cost <= self.plan.search_end
        if fits and self._factor >= self.settings.finest_factor and self._affords(self.plan.race_steps):
            self._start, self._base, self._spent_at_start = self.step, self.scale, self._spent
            self._enter("control", self.step, self.scale)
        else:
            self.phase = "ending"

    def _in_control(self) -> Decision:
        if self.phase == "restart-control":
            return self._start_restart() if self._index == self.plan.restart_steps else self._keep
        if self._index < self.plan.race_steps:
            return self._keep
        snapshots = {"capture": self._slots["control"], "restore": self._slots["start"]}
        if self._only_fallback:
            self._only_fallback, self._has_fallback = False, True
            self._enter("restart-control", self._start, self._base / self.settings.alpha)
            return self._tell(Event.CONTROL_STARTED, self._what_follows(), self._base, **snapshots)
        self._enter("trial", self._start, self._base * self._factor)
        reason = (
            f"the same {self.plan.race_steps} batches again, from step {self.step}: {self.plan.trial_steps} at scale "
            f"{self.scale:.4g}, then {self.plan.return_steps} at {self._base:.4g}"
        )
        return self._tell(Event.TRIAL_STARTED, reason, self._base, **snapshots)

    def _in_trial(self, finite: bool) -> Decision:
        behind = paired.left_behind(self._control, self._trial)
        if not finite:
            return self._lost(Event.ABORTED, "a loss of the trial is not finite")
        if behind:
            return self._lost(Event.ABORTED, f"the trial stays behind, by {behind}", behind)
        if self._index == self.plan.trial_steps:
            self._set_scale(self._base)
        if self._index < self.plan.race_steps:
            return self._keep
        judged = self.plan.return_steps - self.plan.skipped_steps
        gain = paired.gain(self._control, self._trial, judged)
        gain = replace(gain, threshold=self.settings.confidence * gain.error)
        against = f"the trial gained {gain} in loss, needed {gain.threshold:.4g}"
        if not gain.mean > gain.threshold:
            return self._lost(Event.FAILED, against, gain)
        self._races += 1
        before = self._base
        self._set_scale(before * self._factor)
        undone, reason = self.plan.race_steps, f"{against}: scale {before:.4g} -> {self.scale:.4g}"
        self._begin_race()
        capture = None if self.phase == "ending" else self._slots["start"]
        return self._verdict(Event.ACCEPTED, before, reason + self._then(), gain, undone, capture=capture)

    def _lost(self, event: Event, why: str, gain: Gain | None = None) -> Decision:
        undone, tried, is_first = self._index, self._base * self._factor, self._races == 0
        self._races += 1
        self._factor = math.sqrt(self._factor)
        self._set_scale(self._base)
        if is_first and self._may_restart(self._base):
            self._has_fallback = True
            # Where an interruption goes back to, the control is run once more but the trial is not.
            self._spent_at_start = self._spent - self.plan.race_steps
            self._enter("restart-control", self._start, self._base / self.settings.alpha)
            reason = f"{why}; the rate may be too large: {self._what_follows()}"
            return self._verdict(event, tried, reason, gain, undone, restore=self._slots["start"])
        self._has_fallback = True
        return self._go_back(event, tried, why, gain, undone)

    def _go_back(
        self, event: Event, tried: float, why: str, gain: Gain | None = None, undone: int | None = None
    ) -> Decision:
        """To B, which is the next race's A; or to A, where there is no B."""
        if self._has_fallback:
            self._swap("start", "control")
            self.step = self._start + self.plan.race_steps
        else:
            self.step = self._start
        self._set_scale(self._base)
        reason = f"{why}: back to step {self.step}, scale {self.scale:.4g} stays"
        self._begin_race()
        return self._verdict(event, tried, reason + self._then(), gain, undone, restore=self._slots["start"])

    # The restart race

    def _start_restart(self) -> Decision:
        self._enter("restart", 0, self.scale)
        reason = f"a new run from the initial weights at scale {self.scale:.4g}, on the batches since the first step"
        return self._tell(Event.TRIAL_STARTED, reason, self._base, restore=INITIAL)

    def _in_restart(self, finite: bool) -> Decision:
        lead, tried = self.plan.search_start, self.scale
        if not finite and not paired.any_usable(self._control) and self._may_restart(tried):
            undone = self._index
            self._enter("restart", 0, tried / self.settings.alpha)
            reason = f"no more finite than the old run: a new one at scale {self.scale:.4g}"
            return self._verdict(Event.ABORTED, tried, reason, undone=undone, restore=INITIAL)
        behind = paired.hopeless(self._opening, self._trial)
        if not finite:
            return self._go_back(Event.ABORTED, tried, "a loss of the new run is not finite")
        if behind:
            return self._go_back(Event.ABORTED, tried, f"the new run stays behind, by {behind}", behind)
        if self._index == lead:
            return self._tell(Event.CAUGHT_UP, "the new run is as far as the old one", capture=self._slots["winner"])
        if self._index < lead + self.plan.restart_steps:
            return self._keep
        judged = self.plan.restart_steps - self.plan.restart_skipped_steps
        gain = paired.gain(self._control, self._trial, judged)
        allowed = max(self.settings.restart_confidence * gain.error, paired.tolerance(self._opening))
        gain = replace(gain, threshold=-allowed)
        against = f"the new run gained {gain} in loss, was allowed to lose {allowed:.4g}"
        # A control without one usable loss is not worth keeping, whatever the new run is like.
        if gain.mean <= -allowed or (math.isnan(gain.mean) and paired.any_usable(self._control)):
            return self._go_back(Event.FAILED, tried, against, gain)
        before = self._base
        self._opening = self._trial[:lead]
        self._swap("start", "winner")
        self.step, self._start, self._has_fallback = lead, lead, False
        self._spent_at_start = self._spent
        self._set_scale(tried)
        self._base = tried
        reason = f"{against}: scale {before:.4g} -> {self.scale:.4g} from the first step on"
        if self._may_restart(tried):
            self._enter("restart-control", lead, tried / self.settings.alpha)
        else:
            self._begin_race()
        return self._verdict(Event.ACCEPTED, before, reason + self._then(), gain, restore=self._slots["start"])

    # Bookkeeping

    def _enter(self, phase: Phase, step: int, scale: float) -> None:
        """Begin an arm: from this kept step, at this scale."""
        self.phase, self.step, self._index, self._trial = phase, step, 0, []
        if phase in ("control", "restart-control"):
            self._control = []
        self._set_scale(scale)

    def _what_follows(self) -> str:
        if self.phase == "restart-control":
            return f"{self.plan.restart_steps} steps at scale {self.scale:.4g}, to compare a new run with"
        if self._only_fallback:
            return f"{self.plan.race_steps} steps at scale {self.scale:.4g}, to go back to"
        return (
            f"{self.plan.race_steps} steps at scale {self.scale:.4g}, to race {self.scale * self._factor:.4g} against"
        )

    def _then(self) -> str:
        return "" if self.phase == "ending" else f"; next {self._what_follows()}"

    def _may_restart(self, scale: float) -> bool:
        """Whether there may be a restart at the next scale below this one."""
        in_budget = self.settings.budget == "kept" or self._spent + self.plan.restart_cost <= self.plan.train_iters
        in_range = scale / self.settings.alpha >= self.settings.min_scale
        return in_range and in_budget and self._affords(self.plan.restart_cost)

    def _affords(self, steps: int) -> bool:
        return self.settings.affords(self._spent - self.step + steps, self.plan.train_iters)

    def _swap(self, one: str, other: str) -> None:
        self._slots[one], self._slots[other] = self._slots[other], self._slots[one]

    def _end(self) -> Decision:
        self.phase = "done"
        self._opening, self._control, self._trial = [], [], []
        return self._tell(Event.SEARCH_ENDED, f"the search ended with scale {self.scale:.4g}")

    def _set_scale(self, scale: float) -> None:
        self.scale = scale
        self._keep = Decision(scale_before=scale, scale_after=scale)

    def _tell(self, event: Event, reason: str, scale_before: float | None = None, **rest: Any) -> Decision:
        before = self.scale if scale_before is None else scale_before
        return Decision(event=event, step=self.step, scale_before=before, scale_after=self.scale, reason=reason, **rest)

    def _verdict(
        self,
        event: Event,
        before: float,
        reason: str,
        gain: Gain | None = None,
        undone: int | None = None,
        **snapshots: str | None,
    ) -> Decision:
        """A decision that discards steps: `undone` of them, or all that were executed, not kept and not yet told."""
        if undone is None:
            undone = self._executed - self.step - self._accounted
        self._accounted += undone
        numbers = {"gain": gain.mean, "gain_error": gain.error, "threshold": gain.threshold} if gain else {}
        return self._tell(event, reason, before, discarded_steps=undone, **numbers, **snapshots)
