"""Search of the AdaLRS paper (arXiv 2506.13274), as a state machine from losses to decisions."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

from megatron_adalrs.adalrs.decision import Decision, Event
from megatron_adalrs.adalrs.search_plan import SearchPlan
from megatron_adalrs.adalrs.settings import AdaLRSSettings, check_same_search
from megatron_adalrs.adalrs.slope import RunningSlope

_SNAPSHOT = "trial"
_PLAIN_STATE = (
    "step",
    "phase",
    "scale",
    "_boundary",
    "_highest_loss",
    "_adjustments",
    "_rising_windows",
    "_trial_start",
    "_scale_before_trial",
    "_discarded",
)


class Velocity(NamedTuple):
    """Loss descent velocity of a window and its standard error, in loss per step."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"


class PaperController:
    """Search that tries a higher rate when the descent velocity v of a window of k steps falls.

    A velocity is minus the least-squares slope of the loss, and e its standard error. Steps that the
    optimizer skipped and losses that are not finite are counted as steps but excluded from the fit. With
    fewer than 3 losses a velocity is unknown: no decision is based on such a window, and such a trial is
    neutral.

    - Watching, at the end of a window: after two in a row with v < -2e the rate is multiplied by beta'.
      Otherwise, if v < theta * v of the previous window, a trial of k steps starts at alpha' times the rate.
    - A trial's verdict, with E the larger error of the trial and of the window before it: v > v_ref + 2E
      keeps steps and rate; v < v_ref - 2E undoes the steps and, with `on_fail="down"`, multiplies the rate by
      beta'; anything else undoes the steps. A loss that is not finite or above the largest before the trial
      ends it at once as failed. The losses of a trial never raise that maximum, so that a diverging trial
      does not raise the threshold for the next one.
    - With `backtrack=False` no step is undone and no snapshot is taken; all other rules are the same.
    - alpha' and beta' shrink with every verdict and cut: `AdaLRSSettings.raise_factor`, `cut_factor`.

    The state can be saved and loaded after any step. The snapshots belong to the trainer.
    """

    def __init__(self, settings: AdaLRSSettings, plan: SearchPlan) -> None:
        self.settings = settings
        self.plan = plan
        self.step = 0
        self.phase: Literal["before", "watch", "trial", "done"] = "before"
        self._slope = RunningSlope()
        self._boundary = plan.watch_start  # where the window, the trial or the wait before them ends
        self._highest_loss = -math.inf
        self._adjustments = 0
        self._rising_windows = 0
        self._trial_start = 0
        self._scale_before_trial = 1.0
        self._discarded = 0
        self._previous: Velocity | None = None
        self._reference: Velocity | None = None
        self._set_scale(1.0)
        if plan.watch_start == 0:
            self._begin_window()

    @property
    def schedule_offset(self) -> int:
        """Number of steps that the schedule counts in addition to `step`."""
        return self._discarded if self.settings.budget == "total" else 0

    @property
    def has_pending_rollback(self) -> bool:
        """Return whether a trial is in progress, whose steps may be undone."""
        return self.phase == "trial" and self.plan.backtrack

    @property
    def needs_initial(self) -> bool:
        """Return False: no trial begins from the initial weights."""
        return False

    def observe(self, loss: float, applied: bool = True) -> Decision:
        """Count one more kept step and decide what comes next.

        Args:
            loss: Training loss of the step, equal on every rank.
            applied: False when the optimizer skipped the step.
        """
        self.step += 1
        phase = self.phase
        if phase == "done":
            return self._keep
        finite = math.isfinite(loss)
        if phase == "trial":
            if not finite or (applied and loss > self._highest_loss):
                return self._abort(loss)
        elif finite and applied and loss > self._highest_loss:
            self._highest_loss = loss
        if finite and applied and phase != "before":
            self._slope.push(loss)
        if self.step < self._boundary:
            return self._keep
        if phase == "trial":
            return self._judge()
        if phase == "watch":
            return self._end_window()
        self._begin_window()
        return self._keep

    def interrupt(self) -> Decision:
        """Go back to the start of the trial in progress, if any, so that the run can be saved.

        The trial is still to be done: `resume` starts it again in the next process.
        """
        if not self.has_pending_rollback:
            return self._keep
        discarded = self._rewind()
        self._begin_trial()
        reason = f"interrupted {discarded} steps into a trial: back to its start at step {self.step}"
        return self._decide(
            Event.INTERRUPTED, self.scale, restore=_SNAPSHOT, discarded_steps=discarded, reason=reason
        )

    def resume(self) -> Decision:
        """Return what to do before a process's first step: start a trial that is still to be done.

        Raises:
            RuntimeError: The state is from the middle of a trial, whose snapshot ended with its process.
        """
        if not self.has_pending_rollback:
            return self._keep
        if self.step != self._trial_start:
            raise RuntimeError(
                f"the state was saved {self.step - self._trial_start} steps into a trial and the snapshot to "
                "undo it was not saved: call interrupt() before saving"
            )
        return self._trial_started()

    def reset_scale(self) -> None:
        """Set the scale to 1 after the end of the search."""
        self.phase = "done"
        self._set_scale(1.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the settings it belongs to, in types that json writes and reads exactly."""
        return {
            "mode": "paper",
            "settings": asdict(self.settings),
            "plan": asdict(self.plan),
            "slope": self._slope.state_dict(),
            "previous": self._previous,
            "reference": self._reference,
        } | {name.lstrip("_"): getattr(self, name) for name in _PLAIN_STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned.

        Raises:
            ValueError: The state is from a run with other settings, or lacks an entry; nothing has changed.
        """
        check_same_search(state, self.settings, self.plan, entries=self.state_dict())
        for name in _PLAIN_STATE:
            setattr(self, name, state[name.lstrip("_")])
        self._slope.load_state_dict(state["slope"])
        self._previous = state["previous"] and Velocity(*state["previous"])
        self._reference = state["reference"] and Velocity(*state["reference"])
        self._set_scale(self.scale)
        if state["plan"] != asdict(self.plan):
            self.phase = "done"  # an extended run keeps the rate that was found

    def _end_window(self) -> Decision:
        measured, previous = self._measure(), self._previous
        self._count_rising(measured)
        if measured and self._rising_windows >= 2:
            return self._cut(measured)
        threshold = self.settings.decay_threshold * previous.value if previous else None
        if measured and threshold is not None and measured.value < threshold and self._may_try():
            return self._start_trial(measured)
        self._previous = measured
        if self._fits_a_window():
            event, reason = Event.WINDOW, f"velocity {measured or 'unknown'}, before {previous or 'unknown'}"
            self._begin_window()
        else:
            event, reason = Event.SEARCH_ENDED, f"the search ended with scale {self.scale:.4g}"
            self.phase = "done"
        return self._decide(event, self.scale, measured, previous, threshold=threshold, reason=reason)

    def _cut(self, measured: Velocity) -> Decision:
        before = self.scale
        self._cut_from(before)
        self._adjustments += 1
        self._rising_windows = 0
        self._previous = None
        self._begin_window()
        reason = (
            f"the loss rose over two windows, velocity {measured}: scale {before:.4g} -> {self.scale:.4g}"
        )
        return self._decide(Event.SCALED_DOWN, before, measured, threshold=-2 * measured.error, reason=reason)

    def _start_trial(self, reference: Velocity) -> Decision:
        self._reference = reference
        self._trial_start = self.step
        self._scale_before_trial = self.scale
        self._set_scale(self.scale * self.settings.raise_factor(self._adjustments))
        self._begin_trial()
        return self._trial_started()

    def _trial_started(self) -> Decision:
        before, reference, previous = self._scale_before_trial, self._reference, self._previous
        assert previous is not None  # a trial begins after two windows
        threshold = self.settings.decay_threshold * previous.value
        reason = (
            f"velocity {reference} is below {threshold:.4g}: "
            f"{self.plan.window} steps at scale {self.scale:.4g} instead of {before:.4g}"
        )
        return self._decide(
            Event.TRIAL_STARTED,
            before,
            reference,
            previous,
            threshold=threshold,
            capture=self._snapshot,
            reason=reason,
        )

    def _judge(self) -> Decision:
        measured, reference = self._measure(), self._reference
        if measured is None:
            return self._undo(Event.NEUTRAL, "the trial's velocity is unknown")
        assert reference is not None  # set where the trial began
        margin = 2 * max(measured.error, reference.error)
        against = f"trial velocity {measured} against {reference.value:.4g}, margin {margin:.4g}"
        if measured.value < reference.value - margin:
            return self._undo(Event.FAILED, against, measured, margin)
        if not measured.value > reference.value + margin:
            return self._undo(Event.NEUTRAL, against, measured, margin)
        self._adjustments += 1
        self._previous = measured
        self._count_rising(measured)
        self._begin_window()
        reason = f"{against}: scale {self.scale:.4g} stays"
        return self._decide(
            Event.ACCEPTED,
            self.scale,
            measured,
            reference,
            threshold=margin,
            reason=reason,
        )

    def _abort(self, loss: float) -> Decision:
        highest = self._highest_loss
        why = f"loss {loss:.4g} of the trial, largest earlier loss {highest:.4g}"
        return self._undo(Event.ABORTED, why, threshold=highest)

    def _undo(
        self, event: Event, why: str, measured: Velocity | None = None, threshold: float | None = None
    ) -> Decision:
        tried = self.scale
        discarded = self._rewind()
        self._discarded += discarded
        self._set_scale(self._scale_before_trial)
        if event is not Event.NEUTRAL and self.settings.on_fail == "down":
            self._cut_from(self._scale_before_trial)
        self._adjustments += 1
        self._previous = self._reference
        self._begin_window()
        return self._decide(
            event,
            tried,
            measured,
            self._reference,
            threshold=threshold,
            restore=self._snapshot,
            discarded_steps=discarded,
            reason=f"{why}: {'back to' if self._snapshot else 'continue from'} step {self.step}, scale "
            f"{self.scale:.4g}",
        )

    @property
    def _snapshot(self) -> str | None:
        return _SNAPSHOT if self.plan.backtrack else None

    def _rewind(self) -> int:
        """Go back to the trial's start if snapshots are taken. Return the number of steps undone."""
        if not self.plan.backtrack:
            return 0
        discarded = self.step - self._trial_start
        self.step = self._trial_start
        return discarded

    def _begin_trial(self) -> None:
        self.phase = "trial"
        self._slope.reset()
        self._boundary = self.step + self.plan.window

    def _begin_window(self) -> None:
        self.phase = "watch"
        self._slope.reset()
        # If no further window fits, the next step ends the search: a single loss has no velocity.
        self._boundary = self.step + (self.plan.window if self._fits_a_window() else 1)

    def _fits_a_window(self) -> bool:
        return self.step + self.schedule_offset + self.plan.window <= self.plan.search_end

    def _may_try(self) -> bool:
        factor = self.settings.raise_factor(self._adjustments)
        affordable = self.settings.affords(self._discarded + self.plan.window, self.plan.train_iters)
        in_range = factor > 1 and self.scale * factor <= self.settings.max_scale
        return in_range and affordable and self._fits_a_window()

    def _measure(self) -> Velocity | None:
        velocity = Velocity(-self._slope.slope, self._slope.error)
        return velocity if all(map(math.isfinite, velocity)) else None

    def _count_rising(self, measured: Velocity | None) -> None:
        rises = measured is not None and measured.value < -2 * measured.error
        self._rising_windows = self._rising_windows + 1 if rises else 0

    def _cut_from(self, scale: float) -> None:
        self._set_scale(max(scale * self.settings.cut_factor(self._adjustments), self.settings.min_scale))

    def _set_scale(self, scale: float) -> None:
        self.scale = scale
        self._keep = Decision(scale_before=scale, scale_after=scale)

    def _decide(
        self,
        event: Event,
        scale_before: float,
        measured: Velocity | None = None,
        reference: Velocity | None = None,
        **rest: Any,
    ) -> Decision:
        return Decision(
            event=event,
            step=self.step,
            scale_before=scale_before,
            scale_after=self.scale,
            velocity=measured and measured.value,
            error=measured and measured.error,
            reference_velocity=reference and reference.value,
            reference_error=reference and reference.error,
            **rest,
        )
