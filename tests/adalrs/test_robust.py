"""Races of robust mode on a simulated run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from megatron_adalrs.adalrs.controller import Event
from tests.adalrs.race_toy import N, Run, Weights, at_fixed_rate, start


def test_too_small_rate_is_raised() -> None:
    run = start(best=9.0).train()
    assert run.controller.scale == pytest.approx(9.0, rel=0.8)
    assert run.weights.level < at_fixed_rate(9.0).level - 0.05
    first = next(d for d in run.decisions if d.event is Event.ACCEPTED)
    assert first.gain > first.threshold > 0 and first.gain_error > 0
    assert (first.scale_before, first.scale_after) == (1.0, 3.0)


def test_best_rate_does_not_change() -> None:
    run = start(best=1.0).train()
    assert run.weights == at_fixed_rate(1.0)
    assert run.controller.scale == 1.0 and "accepted" not in run.events()
    assert run.executed - N == sum(decision.discarded_steps for decision in run.decisions) > 0


def test_race_compares_equal_rates_and_batches() -> None:
    """A lower rate has a lower loss here as long as it is used, but no rate is lowered."""
    run = start(best=1.0, climb=False)
    arms: dict[str, list[tuple[int, float]]] = {"control": [], "trial": []}

    def loss_at(weights: Weights, scale: float) -> float:
        if run.controller.phase in arms:
            arms[run.controller.phase].append((weights.step, scale))
        return weights.loss(scale)

    run.loss_at = loss_at
    plan = run.controller.plan
    run.train(lambda run: run.events().count("failed") == 1)
    assert [step for step, _ in arms["control"]][: plan.race_steps] == [step for step, _ in arms["trial"]]
    assert [scale for _, scale in arms["trial"]] == [3.0] * plan.trial_steps + [1.0] * plan.return_steps


def test_lost_races_reduce_the_factor() -> None:
    run = start(best=1.0).train()
    lost = [decision for decision in run.decisions if decision.event in (Event.FAILED, Event.ABORTED)]
    up = [decision.scale_before for decision in lost if decision.scale_before > 1]
    assert up == pytest.approx([3.0, math.sqrt(3.0)])
    plain = start(best=1.0, climb=False).train()
    lost = [decision for decision in plain.decisions if decision.event in (Event.FAILED, Event.ABORTED)]
    assert [d.scale_before for d in lost if d.scale_before > 1] == pytest.approx([3.0, math.sqrt(3.0)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 80.0])
def test_diverging_trial_ends_at_once(bad: float) -> None:
    def loss_at(weights: Weights, scale: float) -> float:
        return bad if scale > 1 else weights.loss(scale)

    run = start(best=9.0, loss_at=loss_at).train()
    aborted = [decision for decision in run.decisions if decision.event is Event.ABORTED]
    assert aborted and all(decision.discarded_steps <= 8 for decision in aborted if decision.scale_before > 1)
    assert all(decision.gain is None or decision.gain < decision.threshold < 0 for decision in aborted)
    assert run.weights.path == (1.0,) * N


@pytest.mark.parametrize("factor", [2.0**-10, 2.0**10])
@pytest.mark.parametrize("best", [0.1, 1.0, 9.0])
def test_verdicts_are_invariant_to_the_loss_scale(best: float, factor: float) -> None:
    """All thresholds are relative, so a constant factor on the loss changes nothing."""
    run = start(best).train()
    scaled = start(best, loss_at=lambda weights, scale: factor * weights.loss(scale)).train()
    assert scaled.events() == run.events()
    assert scaled.weights.path == run.weights.path


def test_no_rollback_is_pending_after_an_interruption() -> None:
    run = start(best=9.0, climb=False)
    run.train(lambda run: run.controller.phase == "trial")
    assert run.controller.has_pending_rollback
    with pytest.raises(RuntimeError, match=r"call interrupt\(\) first"):
        run.restarted().train()
    run.apply_decision(run.controller.interrupt())
    assert not run.controller.has_pending_rollback and run.weights.step == run.controller.plan.search_start


@pytest.mark.parametrize("best", [0.1, 1.0, 9.0])
def test_state_can_be_saved_after_every_step(best: float) -> None:
    def moved(run: Run) -> bool:
        run.controller = run.restarted().controller
        return False

    whole, run = start(best).train(), start(best).train(moved)
    assert run.decisions == whole.decisions and run.weights == whole.weights


@settings(max_examples=60, deadline=None)
@given(
    best=strategies.sampled_from([0.02, 0.1, 1.0, 9.0]),
    cuts=strategies.lists(strategies.integers(1, 900), min_size=1, max_size=4),
    budget=strategies.sampled_from([{}, {"budget": "total"}, {"max_discarded": 0.3}]),
)
def test_interruptions_do_not_change_the_run(best: float, cuts: list[int], budget: dict[str, Any]) -> None:
    whole = start(best, **budget).train()
    run = start(best, **budget)
    for cut in cuts:
        ends_at = run.executed + cut
        run.train(lambda run, ends_at=ends_at: run.executed >= ends_at)
        run.apply_decision(run.controller.interrupt())
        run = run.restarted()
    run.train()
    assert run.weights == whole.weights and run.controller.scale == whole.controller.scale
    assert run.controller.schedule_offset == whole.controller.schedule_offset
    assert run.executed - run.weights.step == sum(decision.discarded_steps for decision in run.decisions)


@settings(max_examples=40, deadline=None)
@given(best=strategies.floats(0.01, 30.0), share=strategies.floats(0.0, 0.6))
def test_discarded_steps_stay_within_the_budget(best: float, share: float) -> None:
    run = start(best, max_discarded=share).train()
    assert run.executed - N <= share * N


@settings(max_examples=60, deadline=None)
@given(
    best=strategies.floats(0.01, 30.0),
    share=strategies.floats(0.0, 0.9),
    cuts=strategies.lists(strategies.integers(1, 900), max_size=2),
)
def test_total_budget_counts_executed_steps(best: float, share: float, cuts: list[int]) -> None:
    run = start(best, max_discarded=share, budget="total")
    repeated = 0
    for cut in cuts:
        ends_at = run.executed + cut
        run.train(lambda run, ends_at=ends_at: run.executed >= ends_at)
        decision = run.controller.interrupt()
        repeated += decision.discarded_steps
        run.apply_decision(decision)
        run = run.restarted()
    run.train()
    assert run.controller.phase == "done" and not run.controller.has_pending_rollback
    assert run.weights.step + run.controller.schedule_offset == N
    assert run.controller.schedule_offset <= share * N
    if not cuts:
        assert run.executed == N
    assert run.executed - run.weights.step == sum(decision.discarded_steps for decision in run.decisions)


def test_both_arms_have_the_same_schedule_steps() -> None:
    """The schedule counts steps when a verdict discards them, not while they may be restored."""
    run = start(best=1.0, budget="total")
    places: dict[str, list[tuple[int, int]]] = {}

    def loss_at(weights: Weights, scale: float) -> float:
        arm = run.controller.phase + str(len([1 for d in run.decisions if d.discarded_steps]))
        places.setdefault(arm, []).append((weights.step, weights.step + run.controller.schedule_offset))
        return weights.loss(scale)

    run.loss_at = loss_at
    run.train()
    races = [arm for arm in places if arm.startswith("trial")]
    assert len(races) > 1
    for arm in races:
        control = places["control" + arm.removeprefix("trial")]
        assert places[arm] == control[: len(places[arm])]
    whole = [
        place
        for arm, steps in places.items()
        if not arm.startswith(("trial", "restart"))
        for _, place in steps
    ]
    assert whole == sorted(set(whole)) and whole[-1] == N - 1


@settings(max_examples=40, deadline=None)
@given(seed=strategies.integers(0, 10**6))
def test_arbitrary_losses_are_accepted(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = [math.nan, math.inf, 1.7e308, -1.7e308, 1e30, -3.0, 0.0, 2.0, 2.1]
    run = start(1.0, loss_at=lambda weights, scale: float(random.choice(values))).train()
    assert run.controller.phase == "done" and run.weights.step == N
    assert 1e-4 <= run.controller.scale <= 1e4


def test_end_of_the_search_frees_its_losses() -> None:
    state = start(best=9.0).train().controller.state_dict()
    assert (state["opening"], state["control"], state["trial"]) == ([], [], [])
