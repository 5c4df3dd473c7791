"""Scenarios of paper mode with exact numbers.

The run has 100 steps, windows and trials have 5, and the search extends from step 20 to step 60.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from megatron_adalrs.adalrs import (
    AdaLRSSettings,
    Decision,
    Event,
    FixedRate,
    PaperController,
    build_controller,
)
from megatron_adalrs.adalrs.controller import observed

K = 5
WATCH_START, SEARCH_START, SEARCH_END = 10, 20, 60


def make(**changes: Any) -> PaperController:
    settings = AdaLRSSettings(mode="paper", window=K, search_start=0.2, search_end=0.6, **changes)
    return build_controller(settings, train_iters=100)


class Run:
    """Controller with a method for every kind of loss, and its decisions with an event."""

    def __init__(self, controller: PaperController | None = None, **changes: Any) -> None:
        self.controller = controller or make(**changes)
        self.loss = 100.0
        self.decisions: list[Decision] = []

    def feed(self, loss: float, applied: bool = True) -> Decision:
        decision = self.controller.observe(loss, applied)
        if decision.event is not None:
            self.decisions.append(decision)
        return decision

    def descend(self, velocity: float, steps: int = K, noise: float = 0.0) -> Decision:
        """Feed a linear descent with `noise` of alternating sign, and return the last decision."""
        for i in range(steps):
            self.loss -= velocity
            decision = self.feed(self.loss + noise * (-1) ** i)
        return decision

    def until_trial(self, reference: float = 0.5, noise: float = 0.0) -> Decision:
        """Feed two windows, the second slower than the first, which start the first trial at step 20."""
        self.descend(1.0, WATCH_START)
        self.descend(reference + 0.5)
        decision = self.descend(reference, noise=noise)
        assert decision.event is Event.TRIAL_STARTED
        return decision

    @property
    def events(self) -> list[tuple[int, Event]]:
        return [(decision.step, decision.event) for decision in self.decisions]


def test_slower_window_starts_a_trial() -> None:
    run = Run()
    started = run.until_trial()
    assert run.events == [(15, Event.WINDOW), (20, Event.TRIAL_STARTED)]
    assert (started.scale_before, started.scale_after, run.controller.scale) == (1.0, 3.0, 3.0)
    assert (started.capture, started.restore) == ("trial", None)
    assert started.velocity == pytest.approx(0.5)
    assert started.reference_velocity == pytest.approx(1.0)
    assert started.threshold == pytest.approx(1.0)
    assert run.controller.phase == "trial"


def test_ordinary_step_has_no_event() -> None:
    run = Run()
    first, second = run.feed(5.0), run.feed(4.0)
    assert first == second == Decision(scale_before=1.0, scale_after=1.0)
    assert run.controller.step == 2
    assert first is second


def test_phases_follow_the_plan() -> None:
    run = Run()
    assert run.controller.phase == "before"
    run.descend(1.0, WATCH_START - 1)
    assert run.controller.phase == "before"
    run.descend(1.0, 1)
    assert run.controller.phase == "watch"
    run.descend(1.0, SEARCH_END - WATCH_START)
    assert run.controller.phase == "done"


def test_watch_can_begin_at_step_0() -> None:
    settings = AdaLRSSettings(mode="paper", window=5, search_start=0.1, search_end=0.6)
    run = Run(build_controller(settings, train_iters=100))
    assert run.controller.phase == "watch"
    run.descend(1.0)
    assert run.descend(0.5).event is Event.TRIAL_STARTED


def test_a_step_without_a_loss_is_not_observed() -> None:
    seen, with_gap = Run(), Run()
    for run in (seen, with_gap):
        run.until_trial()
    for step in range(K):
        missing = step == 2
        seen.feed(90.0 - step, applied=not missing)
        with_gap.feed(*observed(None if missing else 90.0 - step, not missing))
    assert with_gap.decisions == seen.decisions
    assert with_gap.controller.state_dict() == seen.controller.state_dict()


def test_faster_trial_is_accepted() -> None:
    run = Run()
    run.until_trial()
    verdict = run.descend(2.0)
    assert verdict.event is Event.ACCEPTED
    assert verdict.step == run.controller.step == 25
    assert (verdict.scale_before, verdict.scale_after, run.controller.scale) == (3.0, 3.0, 3.0)
    assert (verdict.restore, verdict.discarded_steps) == (None, 0)
    assert verdict.velocity == pytest.approx(2.0)
    assert verdict.reference_velocity == pytest.approx(0.5)
    assert run.controller.phase == "watch"


def test_accepted_trial_becomes_the_reference() -> None:
    run = Run()
    run.until_trial()
    run.descend(2.0)
    started = run.descend(1.9)
    assert started.event is Event.TRIAL_STARTED
    assert started.reference_velocity == pytest.approx(2.0)
    assert started.scale_after == pytest.approx(3.0 * 3.0 * 0.99)


def test_slower_trial_is_undone_and_the_rate_halved() -> None:
    run = Run()
    run.until_trial()
    verdict = run.descend(0.1)
    assert verdict.event is Event.FAILED
    assert (verdict.restore, verdict.discarded_steps) == ("trial", K)
    assert verdict.step == run.controller.step == 20
    assert (verdict.scale_before, verdict.scale_after, run.controller.scale) == (3.0, 0.5, 0.5)


def test_on_fail_stay_restores_the_rate() -> None:
    run = Run(on_fail="stay")
    run.until_trial()
    assert run.descend(0.1).scale_after == 1.0
    run.descend(0.4)
    assert run.feed(math.nan).scale_after == 1.0
    assert run.decisions[-1].event is Event.ABORTED


def test_failed_trial_is_kept_without_backtracking() -> None:
    run = Run(backtrack=False)
    started = run.until_trial()
    assert started.capture is None
    failed = run.descend(0.1)
    assert (failed.event, failed.step, failed.scale_after) == (Event.FAILED, 25, pytest.approx(1 / 2))
    assert (failed.restore, failed.discarded_steps) == (None, 0)
    assert "continue from step 25" in failed.reason


def test_trial_can_be_saved_without_backtracking() -> None:
    run = Run(backtrack=False)
    run.until_trial()
    run.descend(2.0, 2)
    assert not run.controller.has_pending_rollback
    assert run.controller.interrupt().event is None
    resumed = make(backtrack=False)
    resumed.load_state_dict(json.loads(json.dumps(run.controller.state_dict())))
    assert resumed.resume().event is None
    again = Run(resumed)
    again.loss = run.loss
    assert again.descend(2.0, 3) == run.descend(2.0, 3)
    assert again.decisions[-1].event is Event.ACCEPTED


def test_undone_trial_keeps_the_reference() -> None:
    run = Run()
    run.until_trial(reference=0.5)
    run.descend(0.1)
    assert run.descend(0.6).event is Event.WINDOW
    assert run.decisions[-1].reference_velocity == pytest.approx(0.5)


@pytest.mark.parametrize("noisy", ["trial", "reference"])
def test_difference_within_two_errors_is_neutral(noisy: str) -> None:
    run = Run()
    run.until_trial(noise=0.3 if noisy == "reference" else 0.0)
    reference = run.decisions[-1]
    verdict = run.descend(0.6, noise=0.3 if noisy == "trial" else 0.0)
    error = verdict.error if noisy == "trial" else reference.error
    assert verdict.event is Event.NEUTRAL
    assert verdict.threshold == pytest.approx(2 * error)
    assert abs(verdict.velocity - verdict.reference_velocity) < verdict.threshold
    assert (verdict.restore, verdict.discarded_steps) == ("trial", K)
    assert (verdict.step, verdict.scale_before, verdict.scale_after) == (20, 3.0, 1.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("applied", [True, False])
def test_nonfinite_loss_aborts_a_trial(loss: float, applied: bool) -> None:
    run = Run()
    run.until_trial()
    run.descend(2.0, 2)
    verdict = run.feed(loss, applied)
    assert verdict.event is Event.ABORTED
    assert (verdict.restore, verdict.discarded_steps) == ("trial", 3)
    assert (verdict.step, verdict.scale_after) == (20, 0.5)


def test_loss_above_all_earlier_ones_aborts_a_trial() -> None:
    run = Run()
    run.feed(120.0)
    run.descend(1.0, WATCH_START - 1)
    run.descend(1.0)
    run.descend(0.5)
    assert run.feed(120.0).event is None
    verdict = run.feed(120.001)
    assert verdict.event is Event.ABORTED
    assert verdict.threshold == 120.0
    assert verdict.discarded_steps == 2


def test_diverging_trial_keeps_the_abort_threshold() -> None:
    run = Run()
    run.until_trial()
    assert run.feed(500.0).event is Event.ABORTED
    assert run.descend(0.4).event is Event.TRIAL_STARTED
    assert run.feed(499.0).event is Event.ABORTED


def test_skipped_and_nonfinite_losses_are_ignored() -> None:
    run = Run()
    run.descend(1.0, WATCH_START - 2)
    run.feed(1e9, applied=False)
    run.feed(math.inf)
    run.descend(1.0, 4)
    run.feed(-1e9, applied=False)
    assert run.decisions[-1].velocity == pytest.approx(1.0)
    assert run.controller.step == 15
    run.descend(0.5)
    verdict = run.feed(1e8)
    assert (verdict.event, verdict.threshold) == (Event.ABORTED, pytest.approx(99.0))


def test_skipped_step_of_a_trial_is_ignored() -> None:
    run = Run()
    run.until_trial()
    run.feed(1e9, applied=False)
    assert run.descend(2.0, K - 1).event is Event.ACCEPTED
    assert run.decisions[-1].velocity == pytest.approx(2.0)


def test_window_with_two_losses_has_no_velocity() -> None:
    run = Run()
    run.descend(1.0, 15)
    run.descend(0.5, 2)
    for _ in range(3):
        run.feed(1.0, applied=False)
    assert run.decisions[-1].event is Event.WINDOW
    assert run.decisions[-1].velocity is None
    assert run.descend(0.1).event is Event.WINDOW
    assert run.decisions[-1].reference_velocity is None
    assert run.descend(0.05).event is Event.TRIAL_STARTED


def test_trial_with_two_losses_is_neutral() -> None:
    run = Run()
    run.until_trial()
    run.descend(2.0, 2)
    for _ in range(3):
        run.feed(1.0, applied=False)
    verdict = run.decisions[-1]
    assert (verdict.event, verdict.velocity, verdict.scale_after) == (Event.NEUTRAL, None, 1.0)


def test_overflowing_losses_have_no_velocity() -> None:
    run = Run()
    run.descend(1.0, WATCH_START)
    for i in range(K):
        run.feed(1.7e308 * (-1) ** i)
    assert (run.decisions[-1].event, run.decisions[-1].velocity) == (Event.WINDOW, None)


def test_two_rising_windows_in_range_cut_the_rate() -> None:
    run = Run(max_scale=1.0)
    run.descend(1.0, 20)
    assert run.descend(-0.1).event is Event.WINDOW
    cut = run.descend(-0.1)
    assert cut.event is Event.SCALED_DOWN
    assert (cut.step, cut.scale_before, cut.scale_after) == (30, 1.0, 0.5)
    assert (cut.capture, cut.restore, cut.discarded_steps) == (None, None, 0)
    after = run.descend(-0.1)
    assert (after.event, after.reference_velocity) == (Event.WINDOW, None)
    assert run.descend(-0.1).scale_after == pytest.approx(0.5 / (2 * 0.99))


def test_the_rise_guard_waits_for_the_range() -> None:
    run = Run()
    run.descend(-1.0, 15)
    assert run.events == [(15, Event.WINDOW)]
    run.descend(-1.0)
    assert run.events[-1] == (20, Event.SCALED_DOWN)


def test_rise_within_two_errors_is_ignored() -> None:
    run = Run(max_scale=1.0)
    run.descend(1.0, 20)
    for _ in range(6):
        run.descend(-0.05, noise=0.5)
    assert {event for _, event in run.events} == {Event.WINDOW}


def test_accepted_trial_separates_rising_windows() -> None:
    run = Run()
    run.until_trial(reference=-0.1)
    assert run.descend(2.0).event is Event.ACCEPTED
    assert run.descend(-0.1).event is Event.TRIAL_STARTED


def test_undone_trial_keeps_rising_windows_adjacent() -> None:
    run = Run()
    run.until_trial(reference=-0.1)
    assert run.descend(-0.5).event is Event.FAILED
    cut = run.descend(-0.1)
    assert (cut.event, cut.scale_before) == (Event.SCALED_DOWN, 0.5)
    assert cut.scale_after == pytest.approx(0.5 / (2 * 0.99))


def test_rate_is_never_cut_below_min_scale() -> None:
    run = Run(min_scale=0.6)
    run.until_trial()
    assert run.descend(0.1).scale_after == 0.6
    run.descend(0.01)
    assert run.descend(-0.5).scale_after == 0.6


def test_no_trial_above_max_scale() -> None:
    assert Run(max_scale=3.0).until_trial().scale_after == 3.0
    run = Run(max_scale=2.9)
    run.descend(1.0, 15)
    assert run.descend(0.5).event is Event.WINDOW


def test_alpha_decays_with_every_verdict() -> None:
    run = Run(decay=0.7, on_fail="stay")
    run.until_trial()
    factors = [3.0]
    for reference in (0.4, 0.3, 0.2):
        run.descend(0.01)
        started = run.descend(reference)
        if started.event is Event.TRIAL_STARTED:
            factors.append(started.scale_after / started.scale_before)
    assert factors == pytest.approx([3.0, 2.1, 1.47, 1.029])
    run.descend(0.01)
    assert run.descend(0.1).event is Event.WINDOW


def test_decay_threshold_scales_the_reference() -> None:
    run = Run(decay_threshold=0.5)
    run.descend(1.0, 15)
    assert run.descend(0.6).event is Event.WINDOW
    assert run.decisions[-1].threshold == pytest.approx(0.5)
    assert run.descend(0.29).event is Event.TRIAL_STARTED


def test_search_ends_once_with_its_last_window() -> None:
    run = Run()
    run.descend(1.0, 100)
    assert [step for step, event in run.events] == list(range(15, 61, 5))
    assert run.events[-1] == (60, Event.SEARCH_ENDED)
    assert run.decisions[-1].velocity == pytest.approx(1.0)
    assert run.controller.step == 100


def test_last_trial_ends_with_the_search() -> None:
    run = Run()
    run.descend(1.0, 50)
    assert run.descend(0.5).event is Event.TRIAL_STARTED
    assert run.descend(2.0).event is Event.ACCEPTED
    assert run.controller.step == SEARCH_END
    assert run.feed(1.0).event is Event.SEARCH_ENDED
    assert (run.controller.step, run.controller.scale) == (61, 3.0)
    late = Run()
    late.descend(1.0, 55)
    assert late.descend(0.5).event is Event.SEARCH_ENDED


def test_interrupted_trial_starts_again() -> None:
    run = Run()
    started = run.until_trial()
    run.descend(2.0, 3)
    back = run.controller.interrupt()
    assert (back.event, back.restore) == (Event.INTERRUPTED, "trial")
    assert (back.step, back.discarded_steps, run.controller.step) == (20, 3, 20)
    assert (back.scale_before, back.scale_after) == (3.0, 3.0)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(run.controller.state_dict())))
    assert resumed.resume() == started
    again = Run(resumed)
    again.loss = run.loss
    assert again.descend(2.0).event is Event.ACCEPTED


def test_interruption_outside_a_trial_does_nothing() -> None:
    run = Run()
    assert run.controller.resume().event is None
    run.descend(1.0, 17)
    assert run.controller.interrupt().event is None
    assert run.controller.step == 17


def test_middle_of_a_trial_cannot_be_resumed() -> None:
    run = Run()
    run.until_trial()
    run.descend(2.0, 2)
    resumed = make()
    resumed.load_state_dict(run.controller.state_dict())
    with pytest.raises(RuntimeError, match=r"2 steps into a trial.*interrupt\(\)"):
        resumed.resume()


@pytest.mark.parametrize(
    ("field", "changes"),
    [("adalrs.alpha", {"alpha": 2.0}), ("adalrs.on_fail", {"on_fail": "stay"})],
)
def test_state_of_other_settings_is_rejected(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=field):
        make(**changes).load_state_dict(make().state_dict())


def test_state_of_another_run_length_is_rejected() -> None:
    settings = AdaLRSSettings(mode="paper", window=K)
    with pytest.raises(ValueError, match=r"train_iters=2000.*train_iters=1000"):
        build_controller(settings, 2000).load_state_dict(build_controller(settings, 1000).state_dict())


def test_incomplete_state_is_rejected() -> None:
    run = Run()
    run.descend(1.0, 17)
    before = run.controller.state_dict()
    state = make().state_dict()
    del state["boundary"]
    with pytest.raises(ValueError, match="lacks boundary"):
        run.controller.load_state_dict(state)
    assert run.controller.state_dict() == before


def test_without_a_search_every_step_is_ordinary() -> None:
    fixed = build_controller(AdaLRSSettings(), train_iters=3)
    assert isinstance(fixed, FixedRate)
    for loss in (1.0, math.nan, 1e9):
        assert fixed.observe(loss).event is None
    assert fixed.interrupt().event is fixed.resume().event is None
    assert (fixed.step, fixed.scale, fixed.phase) == (3, 1.0, "fixed")
    other = FixedRate()
    other.load_state_dict(json.loads(json.dumps(fixed.state_dict())))
    assert other.step == 3


def test_search_cannot_be_switched_on_or_off() -> None:
    with pytest.raises(ValueError, match=r"adalrs\.mode=off"):
        FixedRate().load_state_dict(make().state_dict())
    with pytest.raises(ValueError, match=r"adalrs\.mode="):
        make().load_state_dict(FixedRate().state_dict())


def test_every_event_has_a_reason() -> None:
    run = Run()
    run.until_trial()
    run.descend(0.1)
    assert all(decision.reason for decision in run.decisions)
    assert "0.5" in run.decisions[-1].reason
