"""Robust mode: a state machine that races two continuations of the same weights on the same batches.

The controller performs no I/O: it receives a loss and returns a decision. The rule was developed in this
project. The velocity of a short window is mostly noise, it falls as training proceeds, and a lower rate looks
better at first even if it is worse in the end. None of this affects a race, because both arms use the same
batches and return to the same rate before they are compared. `TRANSITIONS` contains every transition;
docs/adalrs_states.md shows the diagram.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, replace
from enum import Enum
from typing import Any, NamedTuple

from megatron_adalrs.adalrs import race_statistics as paired
from megatron_adalrs.adalrs.decision import Decision, Event
from megatron_adalrs.adalrs.race_statistics import Gain
from megatron_adalrs.adalrs.search_plan import RacePlan
from megatron_adalrs.adalrs.settings import AdaLRSSettings, check_same_search

INITIAL = "initial"
"""Name of the snapshot of the weights before the first step."""
_LATER_CLIMBS = 0.4
"""Share of `climb_gain` that a race of the climb must gain above the rate that was given."""
_LARGEST_LOSS = 1e100  # squares of larger losses overflow


class State(str, Enum):
    """States of the machine; the values are recorded as the phase of a step."""

    BEFORE = "before"
    CONTROL = "control"
    TRIAL = "trial"
    RESTART_CONTROL = "restart-control"
    RESTART = "restart"
    ENDING = "ending"
    DONE = "done"


class Condition(str, Enum):
    """Conditions that cause a transition."""

    RACE_DUE = "the climb or the first full race is due"
    ARM_ENDED = "the arm has taken its steps"
    FALLBACK_REPEATED = "the arm has taken its steps again, after an interrupted restart race"
    RAISED_STEPS_ENDED = "the trial has taken its steps at the raised rate"
    NOT_FINITE = "a loss is not finite"
    NEITHER_FINITE = "neither this loss nor the control's losses are finite, and a lower rate is allowed"
    BEHIND = "the trial's losses are far above the control's"
    CAUGHT_UP = "the new run has taken as many steps as the old one"
    BETTER = "the arm ended and its gain is above the threshold"
    NOT_BETTER = "the arm ended and its gain is not above the threshold"
    STEP = "one more step"
    INTERRUPTED = "the run is interrupted"
    INTERRUPTED_WITH_FALLBACK = "the run is interrupted, and a lost restart would return to an earlier race"


class Transition(NamedTuple):
    """Consequence of a condition in a state."""

    action: str
    """Name of the method of `RobustController`, without its underscore."""
    event: Event | None
    """Kind of decision; None for an ordinary step."""
    next: tuple[State, ...]
    """States that the action can lead to."""


_RACE_OR_END = (State.BEFORE, State.CONTROL, State.ENDING)
_RACE_RESTART_OR_END = (*_RACE_OR_END, State.RESTART_CONTROL)
TRANSITIONS: dict[tuple[State, Condition], Transition] = {
    (State.BEFORE, Condition.RACE_DUE): Transition("first_race", Event.CONTROL_STARTED, _RACE_OR_END),
    (State.CONTROL, Condition.ARM_ENDED): Transition("start_trial", Event.TRIAL_STARTED, (State.TRIAL,)),
    (State.CONTROL, Condition.FALLBACK_REPEATED): Transition(
        "start_restart_control", Event.CONTROL_STARTED, (State.RESTART_CONTROL,)
    ),
    (State.CONTROL, Condition.INTERRUPTED): Transition("repeat_control", Event.INTERRUPTED, (State.CONTROL,)),
    (State.TRIAL, Condition.RAISED_STEPS_ENDED): Transition("return_to_rate", None, (State.TRIAL,)),
    (State.TRIAL, Condition.NOT_FINITE): Transition("lose", Event.ABORTED, _RACE_RESTART_OR_END),
    (State.TRIAL, Condition.BEHIND): Transition("lose", Event.ABORTED, _RACE_RESTART_OR_END),
    (State.TRIAL, Condition.NOT_BETTER): Transition("lose", Event.FAILED, _RACE_RESTART_OR_END),
    (State.TRIAL, Condition.BETTER): Transition("accept", Event.ACCEPTED, _RACE_OR_END),
    (State.TRIAL, Condition.INTERRUPTED): Transition("repeat_control", Event.INTERRUPTED, (State.CONTROL,)),
    (State.RESTART_CONTROL, Condition.ARM_ENDED): Transition(
        "start_restart", Event.TRIAL_STARTED, (State.RESTART,)
    ),
    (State.RESTART_CONTROL, Condition.INTERRUPTED): Transition(
        "repeat_restart_control", Event.INTERRUPTED, (State.RESTART_CONTROL,)
    ),
    (State.RESTART_CONTROL, Condition.INTERRUPTED_WITH_FALLBACK): Transition(
        "repeat_fallback", Event.INTERRUPTED, (State.CONTROL,)
    ),
    (State.RESTART, Condition.NEITHER_FINITE): Transition("restart_lower", Event.ABORTED, (State.RESTART,)),
    (State.RESTART, Condition.NOT_FINITE): Transition("lose_restart", Event.ABORTED, _RACE_OR_END),
    (State.RESTART, Condition.BEHIND): Transition("lose_restart", Event.ABORTED, _RACE_OR_END),
    (State.RESTART, Condition.CAUGHT_UP): Transition("catch_up", Event.CAUGHT_UP, (State.RESTART,)),
    (State.RESTART, Condition.NOT_BETTER): Transition("lose_restart", Event.FAILED, _RACE_OR_END),
    (State.RESTART, Condition.BETTER): Transition("accept_restart", Event.ACCEPTED, _RACE_RESTART_OR_END),
    (State.RESTART, Condition.INTERRUPTED): Transition(
        "repeat_restart_control", Event.INTERRUPTED, (State.RESTART_CONTROL,)
    ),
    (State.RESTART, Condition.INTERRUPTED_WITH_FALLBACK): Transition(
        "repeat_fallback", Event.INTERRUPTED, (State.CONTROL,)
    ),
    (State.ENDING, Condition.STEP): Transition("end", Event.SEARCH_ENDED, (State.DONE,)),
}


class Fallback(str, Enum):
    """State to which a lost restart race returns."""

    START = "start"
    """A, where the race began: there is no B."""
    CONTROL = "control"
    """B, the end of the control of the race that was lost before."""
    REPEAT = "repeat"
    """B, which an interruption has discarded and the control in progress makes again."""


class Finding(NamedTuple):
    """A condition that holds, and what was measured."""

    condition: Condition
    why: str = ""
    gain: Gain | None = None


_SAVED = (
    "step",
    "schedule_offset",
    "scale",
    "_spent",
    "_spent_at_start",
    "_unaccounted",
    "_start",
    "_base",
    "_factor",
    "_may_climb",
    "_restart_may_come",
    "_slots",
    "_opening",
    "_control",
    "_trial",
)


class RobustController:
    """Search that races the current rate against higher ones and, if necessary, restarts at a lower one.

    A rate s that is far too small is detected quickly, and costs more the longer it is used. Therefore the
    *climb* begins at the end of the warm-up: it compares s with s x alpha over `climb_steps` steps on the
    same batches. The trial is kept, and the next race of the climb begins, if over the last half of the steps
    mean(control - trial) exceeds both confidence x SE and `climb_gain` times the decrease of the loss since
    the first step. Above the initial rate, 0.4 times that gain is sufficient, even if it is not significant:
    the gain at this point is a small part of the final gain of a higher rate. The first lost race ends the
    climb. If it was not the first race of the run, and the trial was not worse by confidence x SE, s becomes
    s x sqrt(alpha): two rates that are about equally good lie on either side of the best one.

    A full race from snapshot A: the *control* takes `race_steps` steps at s and ends in snapshot B. The
    *trial*, from A on the same batches, takes `trial_steps` at s x f and the remaining `return_steps` at s.
    With D = control - trial, step by step over the last return steps:

    - mean(D) > confidence x SE(D): s becomes s x f, and the trial's steps are kept.
    - otherwise B is restored, bit for bit as if there had been no trial, and f becomes sqrt(f).
    - a trial whose loss is not finite, or whose last 8 losses lie above the control's by more than their
      standard deviation, ends at once and is lost.

    When the climb's first trial was worse by confidence x SE, or when the first full race is lost and the
    climb raised nothing before it, the rate may be far too large, and the weights too damaged for a lower
    rate to repair. The *restart race* then compares, at the same low rate s / `restart_factor` and on the
    same batches, `restart_steps` steps from here, now A, with the end of a new run from the initial weights.
    Unless the new run is worse by 2.5 SE, it is kept up to A's step, s becomes s / `restart_factor`, and the
    restart race is repeated; the climb and the races after it start again with f = alpha. A restart race of
    the climb that is lost by little may be repeated when the first full race is lost.

    Steps that the optimizer skipped and losses that are not finite are left out of the differences. The state
    can be saved wherever `has_pending_rollback` is False. The snapshots belong to the trainer.
    """

    def __init__(self, settings: AdaLRSSettings, plan: RacePlan) -> None:
        self.settings = settings
        self.plan = plan
        self.step = 0
        self.schedule_offset = 0
        self._state = State.BEFORE
        self._fallback = Fallback.START
        self._unaccounted = 0  # executed steps, less those that decisions have reported as discarded
        self._spent = 0  # executed steps, less those that an interruption makes the run repeat
        self._spent_at_start = 0  # the same at A
        self._start = 0  # A's step
        self._base = 1.0  # A's scale
        self._factor = settings.alpha
        self._may_climb = True  # no race of the climb was lost at this scale
        self._restart_may_come = True  # no rate was raised, and no restart race run but one lost by little
        self._slots = {"start": "first", "control": "second", "winner": "third"}  # names of snapshots
        self._opening: list[float | None] = []  # losses of the kept steps up to the start of full races
        self._control: list[float | None] = []
        self._trial: list[float | None] = []
        self._spread: float | None = None  # of the control, once a trial needs it
        self._set_scale(1.0)

    @property
    def phase(self) -> str:
        """Value of the current `State`."""
        return self._state.value

    @property
    def has_pending_rollback(self) -> bool:
        """Return whether the race in progress may undo steps, or restore steps that were set aside."""
        if self._state is State.RESTART_CONTROL:
            return self._fallback is Fallback.CONTROL or bool(self._control)
        if self._state is State.CONTROL:
            return bool(self._control)
        return self._state in (State.TRIAL, State.RESTART)

    @property
    def needs_initial(self) -> bool:
        """Return whether a restart race is in progress or possible; it begins from snapshot `INITIAL`."""
        # A trial that ends early uses less of the budget than is reserved for it.
        is_affordable = self._state is State.TRIAL or self._may_restart(self._base)
        may_come = self._restart_may_come and self._state not in (State.ENDING, State.DONE) and is_affordable
        repeats = self._fallback is Fallback.REPEAT
        return may_come or repeats or self._state in (State.RESTART_CONTROL, State.RESTART)

    def observe(self, loss: float, applied: bool = True) -> Decision:
        """Count one more step and decide what comes next.

        Args:
            loss: Training loss of the step, equal on every rank.
            applied: False when the optimizer skipped the step.
        """
        self.step += 1
        self._unaccounted += 1
        self._spent += 1
        finite = abs(loss) < _LARGEST_LOSS
        losses = {State.BEFORE: self._opening, State.CONTROL: self._control, State.TRIAL: self._trial}
        losses |= {State.RESTART_CONTROL: self._control, State.RESTART: self._trial}
        if self._state in losses:
            losses[self._state].append(loss if applied and finite else None)
        found = self._check(finite)
        return self._keep if found is None else self._follow(found)

    def interrupt(self) -> Decision:
        """Go back to where the race in progress began, so that the run can be saved; `resume` repeats it."""
        if not self.has_pending_rollback:
            return self._keep
        in_restart = self._state in (State.RESTART_CONTROL, State.RESTART)
        if in_restart and self._fallback is Fallback.CONTROL:
            return self._follow(Finding(Condition.INTERRUPTED_WITH_FALLBACK))
        return self._follow(Finding(Condition.INTERRUPTED))

    def resume(self) -> Decision:
        """Return what to do before a process's first step: keep the initial weights, or begin the race.

        Raises:
            RuntimeError: The state was saved within a race, whose snapshots ended with its process.
        """
        if self.has_pending_rollback:
            raise RuntimeError(
                "the state was saved during a race, without its snapshots: call interrupt() first"
            )
        if self.step == 0 and self.needs_initial:
            return self._decide(
                Event.INITIAL_KEPT, "the initial weights are kept, for a restart", capture=INITIAL
            )
        if self._state in (State.CONTROL, State.RESTART_CONTROL):
            return self._decide(Event.CONTROL_STARTED, self._what_follows(), capture=self._slots["start"])
        return self._keep

    def reset_scale(self) -> None:
        """Set the scale to 1 after the end of the search."""
        self._state = State.DONE
        self._set_scale(1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the settings it belongs to, in types that json writes and reads exactly."""
        state = {name.lstrip("_"): copy.copy(getattr(self, name)) for name in _SAVED}
        state |= {"phase": self._state.value, "fallback": self._fallback.value}
        return {"mode": "robust", "settings": asdict(self.settings), "plan": asdict(self.plan)} | state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned.

        Raises:
            ValueError: The state is from a run with other settings, or lacks an entry; nothing has changed.
        """
        check_same_search(state, self.settings, self.plan, entries=self.state_dict())
        for name in _SAVED:
            setattr(self, name, copy.copy(state[name.lstrip("_")]))
        self._state, self._fallback = State(state["phase"]), Fallback(state["fallback"])
        self._spread = None
        self._set_scale(self.scale)
        if state["plan"] != asdict(self.plan):  # an extended run keeps the rate that was found
            self._state = State.DONE
            self._opening, self._control, self._trial = [], [], []

    # Conditions

    def _check(self, finite: bool) -> Finding | None:
        """Return the condition that holds after a step in the current state; None if there is none."""
        if self._state is State.BEFORE:
            is_due = self.step in (self.plan.climb_start, self.plan.search_start)
            return Finding(Condition.RACE_DUE) if is_due else None
        if self._state is State.CONTROL and len(self._control) == self._arm_steps:
            repeats = self._fallback is Fallback.REPEAT
            return Finding(Condition.FALLBACK_REPEATED if repeats else Condition.ARM_ENDED)
        if self._state is State.RESTART_CONTROL and len(self._control) == self.plan.restart_steps:
            return Finding(Condition.ARM_ENDED)
        if self._state is State.TRIAL:
            return self._check_trial(finite)
        if self._state is State.RESTART:
            return self._check_restart(finite)
        return Finding(Condition.STEP) if self._state is State.ENDING else None

    def _check_trial(self, finite: bool) -> Finding | None:
        if not finite:
            return Finding(Condition.NOT_FINITE, "a loss of the trial is not finite")
        if self._spread is None:
            self._spread = paired.spread(self._control)
        if behind := paired.left_behind(self._control, self._trial, self._spread):
            return Finding(Condition.BEHIND, f"the trial is far above the control, gain {behind}", behind)
        if len(self._trial) == self.plan.trial_steps and not self._in_climb:
            return Finding(Condition.RAISED_STEPS_ENDED)
        if len(self._trial) < self._arm_steps:
            return None
        gain = self._gain_of_trial()
        why = f"the trial gained {gain} in loss, needed {gain.threshold:.4g}"
        is_better = gain.mean > gain.threshold
        return Finding(Condition.BETTER if is_better else Condition.NOT_BETTER, why, gain)

    def _check_restart(self, finite: bool) -> Finding | None:
        lead = self._start
        if not finite:
            if not paired.any_usable(self._control) and self._may_restart(self.scale):
                return Finding(Condition.NEITHER_FINITE)
            return Finding(Condition.NOT_FINITE, "a loss of the new run is not finite")
        if behind := paired.hopeless(self._opening, self._trial, self.plan.warmup_iters):
            return Finding(Condition.BEHIND, f"the new run is far above the old one, gain {behind}", behind)
        if len(self._trial) == lead:
            return Finding(Condition.CAUGHT_UP)
        if len(self._trial) < lead + self.plan.restart_steps:
            return None
        judged = self.plan.restart_steps - self.plan.restart_skipped_steps
        gain = paired.gain(self._control, self._trial, judged)
        gain = replace(gain, threshold=self.settings.restart_confidence * gain.error)
        why = f"the new run gained {gain} in loss, needed {gain.threshold:.4g}"
        # A control without a usable loss is never kept.
        unknown = math.isnan(gain.mean)
        is_lost = gain.mean <= gain.threshold or (unknown and paired.any_usable(self._control))
        return Finding(Condition.NOT_BETTER if is_lost else Condition.BETTER, why, gain)

    def _gain_of_trial(self) -> Gain:
        if self._in_climb:
            gain = paired.gain(self._control, self._trial, self.plan.climb_judged)
            least = self.settings.climb_gain * paired.descent(self._opening)
            if self._base > 1:
                return replace(gain, threshold=_LATER_CLIMBS * least)
        else:
            gain = paired.gain(self._control, self._trial, self.plan.return_steps - self.plan.skipped_steps)
            least = 0.0
        return replace(gain, threshold=max(self.settings.confidence * gain.error, least))

    # Actions of the transitions

    def _follow(self, found: Finding) -> Decision:
        transition = TRANSITIONS[self._state, found.condition]
        decision: Decision = getattr(self, f"_{transition.action}")(transition.event, found)
        assert self._state in transition.next
        return decision

    def _first_race(self, event: Event, found: Finding) -> Decision:
        self._begin_race()
        if self._state in (State.BEFORE, State.ENDING):
            return self._keep
        return self._decide(event, self._what_follows(), capture=self._slots["start"])

    def _start_trial(self, event: Event, found: Finding) -> Decision:
        self._enter(State.TRIAL, self._start, self._base * self._tried_factor)
        reason = f"the same {self._arm_steps} batches again, from step {self.step}, at scale {self.scale:.4g}"
        if not self._in_climb:
            reason += f" for {self.plan.trial_steps} steps, then at {self._base:.4g}"
        return self._decide(event, reason, self._base, **self._keep_control())

    def _start_restart_control(self, event: Event, found: Finding) -> Decision:
        self._fallback = Fallback.CONTROL
        self._enter_restart_control()
        return self._decide(event, self._what_follows(), self._base, **self._keep_control())

    def _return_to_rate(self, event: None, found: Finding) -> Decision:
        self._set_scale(self._base)
        return self._keep

    def _accept(self, event: Event, found: Finding) -> Decision:
        undone = self._arm_steps
        if self._in_climb:
            self._opening += self._trial
        self._restart_may_come = False  # a rate that was raised is not too large
        before = self._base
        self._set_scale(before * self._tried_factor)
        reason = f"{found.why}: scale {before:.4g} -> {self.scale:.4g}"
        self._begin_race()
        capture = None if self._state in (State.BEFORE, State.ENDING) else self._slots["start"]
        return self._verdict(event, before, reason + self._then(), found.gain, undone, capture=capture)

    def _lose(self, event: Event, found: Finding) -> Decision:
        undone, tried = len(self._trial), self._base * self._tried_factor
        self._fallback = Fallback.CONTROL
        if self._in_climb:
            return self._lose_climb(event, found, tried, undone)
        self._factor = math.sqrt(self._factor)
        self._set_scale(self._base)
        if self._restart_may_come and self._may_restart(self._base):
            # After an interruption the control is repeated, but not the trial.
            self._spent_at_start = self._spent - self.plan.race_steps
            self._restart_may_come = False
            self._enter_restart_control()
            reason = f"{found.why}; the rate may be too large: {self._what_follows()}"
            return self._verdict(event, tried, reason, found.gain, undone, restore=self._slots["start"])
        self._restart_may_come = False
        return self._go_back(event, found.why, tried, found.gain, undone)

    def _lose_climb(self, event: Event, found: Finding, tried: float, undone: int) -> Decision:
        self._may_climb = False
        self._opening += self._control
        why, gain = found.why, found.gain
        # The first full race need not try the factor that was just lost, unless no race would be left.
        if math.sqrt(self._factor) >= self.settings.finest_factor:
            self._factor = math.sqrt(self._factor)
        at_best = gain.mean + self.settings.confidence * gain.error if gain else math.nan
        if self._start == self.plan.climb_start:
            is_worse = event is Event.ABORTED or at_best < 0
            return self._go_back(event, why, tried, gain, undone, restart_is_due=is_worse)
        if event is Event.FAILED and at_best >= 0:
            why += f", not significantly worse than {self._base:.4g}: continuing halfway between"
            self._base *= math.sqrt(self.settings.alpha)
            self._restart_may_come = False
        return self._go_back(event, why, tried, gain, undone)

    def _start_restart(self, event: Event, found: Finding) -> Decision:
        self._enter(State.RESTART, 0, self.scale)
        reason = (
            f"a new run from the initial weights at scale {self.scale:.4g}, on the batches from step 0 on"
        )
        return self._decide(event, reason, self._base, restore=INITIAL)

    def _restart_lower(self, event: Event, found: Finding) -> Decision:
        tried, undone = self.scale, len(self._trial)
        self._enter(State.RESTART, 0, tried / self.settings.restart_factor)
        reason = f"its losses are not finite either: a new run at scale {self.scale:.4g}"
        return self._verdict(event, tried, reason, undone=undone, restore=INITIAL)

    def _catch_up(self, event: Event, found: Finding) -> Decision:
        return self._decide(
            event, "the new run has reached the step of the old one", capture=self._slots["winner"]
        )

    def _lose_restart(self, event: Event, found: Finding) -> Decision:
        if found.condition is Condition.BEHIND and found.gain:
            self._restart_may_come = self._in_climb and not paired.is_far(found.gain, self._opening)
        elif found.condition is Condition.NOT_BETTER:
            self._restart_may_come = self._in_climb
        return self._go_back(event, found.why, self.scale, found.gain)

    def _accept_restart(self, event: Event, found: Finding) -> Decision:
        before, lead = self._base, self._start
        self._opening = self._trial[:lead]
        self._swap("start", "winner")
        self.step, self._fallback = lead, Fallback.START
        self._spent_at_start = self._spent
        self._base = self.scale
        # The steps down are large, so the last one may be too far.
        self._factor, self._may_climb = self.settings.alpha, True
        reason = f"{found.why}: scale {before:.4g} -> {self.scale:.4g} from the first step on"
        if self._may_restart(self.scale):
            self._enter_restart_control()
        else:
            self._begin_race()
        return self._verdict(event, before, reason + self._then(), found.gain, restore=self._slots["start"])

    def _repeat_restart_control(self, event: Event, found: Finding) -> Decision:
        self._enter_restart_control()
        return self._rewind(event)

    def _repeat_fallback(self, event: Event, found: Finding) -> Decision:
        self._fallback = Fallback.REPEAT
        return self._repeat_control(event, found)

    def _repeat_control(self, event: Event, found: Finding) -> Decision:
        self._enter(State.CONTROL, self._start, self._base)
        return self._rewind(event)

    def _end(self, event: Event, found: Finding) -> Decision:
        self._state = State.DONE
        self._opening, self._control, self._trial = [], [], []
        return self._decide(event, f"the search ended with scale {self.scale:.4g}")

    # Parts of actions

    def _begin_race(self, restart_is_due: bool = False) -> None:
        """Begin a race from here at the current scale, if one fits; otherwise end the climb or the search."""
        self.schedule_offset = self._spent - self.step if self.settings.budget == "total" else 0
        if restart_is_due and self._may_restart(self.scale):
            self._mark_start()
            self._restart_may_come = False
            self._enter_restart_control()
            return
        if self.step < self.plan.search_start:
            self._state = State.BEFORE
            may_rise = self.scale * self.settings.alpha <= self.settings.max_scale
            fits = self.step + self.plan.climb_steps <= self.plan.search_start
            if self._may_climb and fits and may_rise and self._affords(self.plan.climb_steps):
                self._begin_control()
            return
        finest, highest = self.settings.finest_factor, self.settings.max_scale
        while self.scale * self._factor > highest and self._factor >= finest:
            self._factor = math.sqrt(self._factor)
        cost = (2 if self.settings.budget == "total" else 1) * self.plan.race_steps
        fits = self.step + self.schedule_offset + cost <= self.plan.search_end
        if fits and self._factor >= finest and self._affords(self.plan.race_steps):
            self._begin_control()
        else:
            self._state = State.ENDING

    def _begin_control(self) -> None:
        self._mark_start()
        self._enter(State.CONTROL, self.step, self.scale)

    def _mark_start(self) -> None:
        """Make the current step A; the trainer captures its snapshot."""
        self._start, self._base, self._spent_at_start = self.step, self.scale, self._spent
        self._fallback = Fallback.START

    def _enter(self, state: State, step: int, scale: float) -> None:
        """Begin an arm at this kept step and scale."""
        self._state, self.step, self._trial = state, step, []
        if state in (State.CONTROL, State.RESTART_CONTROL):
            self._control, self._spread = [], None
        self._set_scale(scale)

    def _enter_restart_control(self) -> None:
        """Begin the steps from A at the lower scale, with which a new run will be compared."""
        self._enter(State.RESTART_CONTROL, self._start, self._base / self.settings.restart_factor)

    def _go_back(
        self,
        event: Event,
        why: str,
        tried: float,
        gain: Gain | None = None,
        undone: int | None = None,
        restart_is_due: bool = False,
    ) -> Decision:
        """Return to B, which becomes A of the next race, or to A if there is no B."""
        if self._fallback is Fallback.CONTROL:
            self._swap("start", "control")
            self.step = self._start + self._arm_steps
        else:
            self.step = self._start
        self._set_scale(self._base)
        reason = f"{why}: back to step {self.step}"
        self._begin_race(restart_is_due)
        if self._state is not State.RESTART_CONTROL:
            reason += f", continuing at scale {self.scale:.4g}"
        return self._verdict(event, tried, reason + self._then(), gain, undone, restore=self._slots["start"])

    def _rewind(self, event: Event) -> Decision:
        self._spent = self._spent_at_start
        reason = f"interrupted within a race: back to its start at step {self.step}"
        return self._verdict(event, self.scale, reason, restore=self._slots["start"])

    def _keep_control(self) -> dict[str, str]:
        return {"capture": self._slots["control"], "restore": self._slots["start"]}

    def _swap(self, one: str, other: str) -> None:
        self._slots[one], self._slots[other] = self._slots[other], self._slots[one]

    def _set_scale(self, scale: float) -> None:
        self.scale = scale
        self._keep = Decision(scale_before=scale, scale_after=scale)

    # Derived quantities

    @property
    def _in_climb(self) -> bool:
        return self._start < self.plan.search_start

    @property
    def _arm_steps(self) -> int:
        return self.plan.climb_steps if self._in_climb else self.plan.race_steps

    @property
    def _tried_factor(self) -> float:
        return self.settings.alpha if self._in_climb else self._factor

    def _affords(self, steps: int) -> bool:
        return self.settings.affords(self._spent - self.step + steps, self.plan.train_iters)

    def _may_restart(self, scale: float) -> bool:
        """Return whether a restart at the next scale below this one is allowed."""
        cost, length = self.plan.restart_cost, self.plan.train_iters
        in_budget = self.settings.budget == "kept" or self._spent + cost <= length
        in_range = self.settings.min_scale <= scale / self.settings.restart_factor
        return in_range and in_budget and self._affords(cost)

    # Decisions and their reasons

    def _what_follows(self) -> str:
        if self._state is State.RESTART_CONTROL:
            return f"{self.plan.restart_steps} steps at scale {self.scale:.4g}, as the control for a new run"
        if self._fallback is Fallback.REPEAT:
            return f"{self.plan.race_steps} steps at scale {self.scale:.4g}, to repeat the control"
        higher = self.scale * self._tried_factor
        return f"{self._arm_steps} steps at scale {self.scale:.4g}, as the control for {higher:.4g}"

    def _then(self) -> str:
        return "" if self._state in (State.BEFORE, State.ENDING) else f"; next {self._what_follows()}"

    def _decide(self, event: Event, reason: str, scale_before: float | None = None, **rest: Any) -> Decision:
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
        """Return a decision that discards `undone` steps; default: all that are neither kept nor reported."""
        if undone is None:
            undone = self._unaccounted - self.step
        self._unaccounted -= undone
        numbers = {"gain": gain.mean, "gain_error": gain.error, "threshold": gain.threshold} if gain else {}
        return self._decide(event, reason, before, discarded_steps=undone, **numbers, **snapshots)
