"""The paired race: two futures of the same weights on the same batches, judged at the same learning rate.

A pure state machine: a loss in, a decision out. The rule is this project's own. The velocity of a short
window is mostly noise, it falls by itself as training goes on, and a lower rate looks better at first,
whatever comes of it. All three vanish where both arms see the same batches and return to the same rate before
they are judged.
"""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_adalrs.adalrs import race_statistics as paired
from megatron_adalrs.adalrs.decision import Decision, Event
from megatron_adalrs.adalrs.race_state import INITIAL, RaceState
from megatron_adalrs.adalrs.race_statistics import Gain

_LATER_CLIMBS = 0.4
"""Of `climb_gain`: what a race of the climb must gain above the rate that was given."""
_LARGEST_LOSS = 1e100  # squares of larger ones overflow


class RobustController(RaceState):
    """Races the current rate s against a higher one and, when the first race is lost, a restart at a lower
    one.

    A rate that is far too small shows at once, and costs more the longer it stays. So from the end of the
    warm-up on there is a *climb*: s for `climb_steps` steps against s x alpha on the same batches. The trial
    is kept, and the next race of the climb begins, if over the last half mean(control - trial) > confidence x
    SE, and > `climb_gain` of what the loss has fallen by since the first step: over so few steps, so early,
    more than the best rate may look better. Above the rate that was given, which so was far too small, 0.4 of
    that gain will do, sure or not: what is gained so soon is a small part of what a higher rate gains in the
    end. The first race that is lost ends the climb. If it was not the run's very first, and not worse by
    confidence x SE, s becomes s x sqrt(alpha): two rates about as good as each other lie on either side of
    the best one.

    A full race, from snapshot A: the *control* takes `race_steps` steps at s and ends in snapshot B; the
    *trial*, from A on the same batches, takes `trial_steps` at s x f and the `return_steps` that remain at s.
    With D = control - trial, step by step over the last of the return steps:

    - mean(D) > confidence x SE(D): s becomes s x f, and the trial's steps are kept.
    - otherwise B is restored, to the bit as if there had been no trial, and f becomes sqrt(f).
    - a trial that is not finite, or whose last 8 losses lie above the control's by more than the standard
    deviation of
      those, ends at once and is lost.

    When the climb's first trial was worse by confidence x SE, or else when the very first full race is lost
    and the climb raised nothing before it, the rate may be far too large, and the weights too damaged for a
    lower rate to mend them. Then and there the *restart race* compares, at the same low rate s /
    `restart_factor` and on the same batches, `restart_steps` steps that go on from here, now A, with the end
    of a new run from the initial weights. Unless the new run is worse by 2.5 SE, it is kept up to A's step, s
    becomes s / `restart_factor`, and the restart race is repeated; the climb and the races after it go up
    from there, from f = alpha on. A restart race of the climb that is lost, but not by far, may be run again
    when the first full race is lost: so early little damage is done yet.

    Steps that the optimizer skipped and losses that are not finite take no part in a difference. The state
    can be saved wherever `has_pending_rollback` is False. The snapshots belong to the trainer.
    """

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
            is_due = self.step in (self.plan.climb_start, self.plan.search_start)
            return self._first_race() if is_due else self._keep
        self._index += 1
        if self.phase in ("control", "restart-control"):
            self._control.append(usable)
            return self._in_control()
        self._trial.append(usable)
        return self._in_restart(finite) if self.phase == "restart" else self._in_trial(finite)

    # The race

    def _first_race(self) -> Decision:
        self._begin_race()
        if self.phase in ("before", "ending"):
            return self._keep
        return self._tell(Event.CONTROL_STARTED, self._what_follows(), capture=self._slots["start"])

    def _begin_race(self, restart_is_due: bool = False) -> None:
        """A race from here and the current scale, if one fits in; otherwise the climb or the search is
        over."""
        self.schedule_offset = self._spent - self.step if self.settings.budget == "total" else 0
        if restart_is_due and self._may_restart(self.scale):
            self._mark_start()
            self._begin_restart()
            return
        if self.step < self.plan.search_start:
            self.phase = "before"
            if self._may_climb:
                self._begin_climb()
            return
        while (
            self.scale * self._factor > self.settings.max_scale
            and self._factor >= self.settings.finest_factor
        ):
            self._factor = math.sqrt(self._factor)
        cost = (2 if self.settings.budget == "total" else 1) * self.plan.race_steps
        fits = self.step + self.schedule_offset + cost <= self.plan.search_end
        if fits and self._factor >= self.settings.finest_factor and self._affords(self.plan.race_steps):
            self._begin()
        else:
            self.phase = "ending"

    def _begin_climb(self) -> None:
        fits = self.step + self.plan.climb_steps <= self.plan.search_start
        may_rise = self.scale * self.settings.alpha <= self.settings.max_scale
        if fits and may_rise and self._affords(self.plan.climb_steps):
            self._begin()

    def _begin(self) -> None:
        self._mark_start()
        self._enter("control", self.step, self.scale)

    def _mark_start(self) -> None:
        """Here is A; its snapshot is the trainer's to capture."""
        self._start, self._base, self._spent_at_start, self._has_fallback = (
            self.step,
            self.scale,
            self._spent,
            False,
        )

    def _begin_restart(self) -> None:
        self._restart_may_come = False
        self._enter_restart_control()

    def _in_control(self) -> Decision:
        if self.phase == "restart-control":
            return self._start_restart() if self._index == self.plan.restart_steps else self._keep
        if self._index < self._arm_steps:
            return self._keep
        snapshots = {"capture": self._slots["control"], "restore": self._slots["start"]}
        if self._only_fallback:
            self._only_fallback, self._has_fallback = False, True
            self._enter_restart_control()
            return self._tell(Event.CONTROL_STARTED, self._what_follows(), self._base, **snapshots)
        self._enter("trial", self._start, self._base * self._tried_factor)
        reason = f"the same {self._arm_steps} batches again, from step {self.step}, at scale {self.scale:.4g}"
        if not self._in_climb:
            reason += f" for {self.plan.trial_steps} steps, then at {self._base:.4g}"
        return self._tell(Event.TRIAL_STARTED, reason, self._base, **snapshots)

    def _in_trial(self, finite: bool) -> Decision:
        behind = paired.left_behind(self._control, self._trial, self._spread_of_control())
        if not finite:
            return self._lost(Event.ABORTED, "a loss of the trial is not finite")
        if behind:
            return self._lost(Event.ABORTED, f"the trial stays behind, by {behind}", behind)
        if self._index == self.plan.trial_steps and not self._in_climb:
            self._set_scale(self._base)
        undone = self._arm_steps
        if self._index < undone:
            return self._keep
        gain = self._gain_of_trial()
        against = f"the trial gained {gain} in loss, needed {gain.threshold:.4g}"
        if not gain.mean > gain.threshold:
            return self._lost(Event.FAILED, against, gain)
        if self._in_climb:
            self._opening += self._trial
        self._restart_may_come = False  # a rate that was raised is not too large
        before = self._base
        self._set_scale(before * self._tried_factor)
        reason = f"{against}: scale {before:.4g} -> {self.scale:.4g}"
        self._begin_race()
        capture = None if self.phase in ("before", "ending") else self._slots["start"]
        return self._verdict(Event.ACCEPTED, before, reason + self._then(), gain, undone, capture=capture)

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

    def _lost(self, event: Event, why: str, gain: Gain | None = None) -> Decision:
        undone, tried = self._index, self._base * self._tried_factor
        self._has_fallback = True
        if self._in_climb:
            return self._lost_climb(event, tried, why, gain, undone)
        self._factor = math.sqrt(self._factor)
        self._set_scale(self._base)
        if self._restart_may_come and self._may_restart(self._base):
            # Where an interruption goes back to, the control is run once more but the trial is not.
            self._spent_at_start = self._spent - self.plan.race_steps
            self._begin_restart()
            reason = f"{why}; the rate may be too large: {self._what_follows()}"
            return self._verdict(event, tried, reason, gain, undone, restore=self._slots["start"])
        self._restart_may_come = False
        return self._go_back(event, tried, why, gain, undone)

    def _lost_climb(self, event: Event, tried: float, why: str, gain: Gain | None, undone: int) -> Decision:
        self._may_climb = False
        self._opening += self._control
        # There is to be a full race, but the first need not try what has just been lost (from half way it
        # does).
        if math.sqrt(self._factor) >= self.settings.finest_factor:
            self._factor = math.sqrt(self._factor)
        at_best = gain.mean + self.settings.confidence * gain.error if gain else math.nan
        if self._start == self.plan.climb_start:
            is_worse = event is Event.ABORTED or at_best < 0
            return self._go_back(event, tried, why, gain, undone, restart_is_due=is_worse)
        if event is Event.FAILED and at_best >= 0:
            why += f", no worse for sure than {self._base:.4g}: half way between"
            self._base *= math.sqrt(self.settings.alpha)
            self._restart_may_come = False
        return self._go_back(event, tried, why, gain, undone)

    def _go_back(
        self,
        event: Event,
        tried: float,
        why: str,
        gain: Gain | None = None,
        undone: int | None = None,
        restart_is_due: bool = False,
    ) -> Decision:
        """To B, which is the next race's A; or to A, where there is no B."""
        if self._has_fallback:
            self._swap("start", "control")
            self.step = self._start + self._arm_steps
        else:
            self.step = self._start
        self._set_scale(self._base)
        reason = f"{why}: back to step {self.step}"
        self._begin_race(restart_is_due)
        if self.phase != "restart-control":
            reason += f", on at scale {self.scale:.4g}"
        return self._verdict(event, tried, reason + self._then(), gain, undone, restore=self._slots["start"])

    # The restart race

    def _start_restart(self) -> Decision:
        self._enter("restart", 0, self.scale)
        reason = (
            f"a new run from the initial weights at scale {self.scale:.4g}, on the batches since the "
            f"first step"
        )
        return self._tell(Event.TRIAL_STARTED, reason, self._base, restore=INITIAL)

    def _in_restart(self, finite: bool) -> Decision:
        lead, tried = self._start, self.scale
        if not finite and not paired.any_usable(self._control) and self._may_restart(tried):
            undone = self._index
            self._enter("restart", 0, tried / self.settings.restart_factor)
            reason = f"no more finite than the old run: a new one at scale {self.scale:.4g}"
            return self._verdict(Event.ABORTED, tried, reason, undone=undone, restore=INITIAL)
        behind = paired.hopeless(self._opening, self._trial, self.plan.warmup_iters)
        if not finite:
            return self._go_back(Event.ABORTED, tried, "a loss of the new run is not finite")
        if behind:
            self._restart_may_come = self._in_climb and not paired.is_far(behind, self._opening)
            return self._go_back(Event.ABORTED, tried, f"the new run stays behind, by {behind}", behind)
        if self._index == lead:
            return self._tell(
                Event.CAUGHT_UP, "the new run is as far as the old one", capture=self._slots["winner"]
            )
        if self._index < lead + self.plan.restart_steps:
            return self._keep
        judged = self.plan.restart_steps - self.plan.restart_skipped_steps
        gain = paired.gain(self._control, self._trial, judged)
        gain = replace(gain, threshold=self.settings.restart_confidence * gain.error)
        against = f"the new run gained {gain} in loss, needed {gain.threshold:.4g}"
        # A control without one usable loss is not worth keeping, whatever the new run is like.
        if gain.mean <= gain.threshold or (math.isnan(gain.mean) and paired.any_usable(self._control)):
            self._restart_may_come = self._in_climb
            return self._go_back(Event.FAILED, tried, against, gain)
        before = self._base
        self._opening = self._trial[:lead]
        self._swap("start", "winner")
        self.step, self._has_fallback = lead, False
        self._spent_at_start = self._spent
        self._set_scale(tried)
        self._base = tried
        # The steps down are coarse, and the last may be one too many.
        self._factor, self._may_climb = self.settings.alpha, True
        reason = f"{against}: scale {before:.4g} -> {self.scale:.4g} from the first step on"
        if self._may_restart(tried):
            self._enter_restart_control()
        else:
            self._begin_race()
        return self._verdict(
            Event.ACCEPTED, before, reason + self._then(), gain, restore=self._slots["start"]
        )

    def _end(self) -> Decision:
        self.phase = "done"
        self._opening, self._control, self._trial = [], [], []
        return self._tell(Event.SEARCH_ENDED, f"the search ended with scale {self.scale:.4g}")
