"""The climb of robust mode: races without return steps, before the first full one."""

from __future__ import annotations

import math

import pytest

from megatron_adalrs.adalrs.controller import Event
from megatron_adalrs.adalrs.settings import AdaLRSSettings
from tests.adalrs.race_toy import NOISE, Weights, far_below, start


def test_far_too_small_rate_is_raised_after_warm_up() -> None:
    run = start(30.0, far_below, climb_gain=0.1)
    run.train(lambda run: run.weights.step == run.controller.plan.search_start)
    climbs = [decision for decision in run.decisions if decision.event is Event.ACCEPTED]
    assert [decision.scale_after for decision in climbs] == pytest.approx([3.0, 9.0, 27.0])
    plan = run.controller.plan
    first, last = plan.climb_start, plan.climb_start + 3 * plan.climb_steps
    assert [decision.step for decision in climbs] == list(
        range(first + plan.climb_steps, last + 1, plan.climb_steps)
    )
    assert (
        run.executed - run.weights.step == 4 * plan.climb_steps
    )  # three controls and the trial that was lost
    after = plan.search_start - last - plan.climb_steps
    assert run.weights.path[last:] == pytest.approx(
        (27.0,) * plan.climb_steps + (27.0 * math.sqrt(3.0),) * after
    )
    assert climbs[0].gain > climbs[0].threshold > 0.1 * 0.02


@pytest.mark.parametrize(("share", "scale"), [(0.6, 9.0), (0.2, 3.0 * math.sqrt(3.0))])
def test_end_of_a_climb_after_a_raise(share: float, scale: float) -> None:
    """The second race gains `share` of the threshold of the first, within the error."""
    needed = 0.05  # 1 % of the 5 that the loss falls by before any race

    def loss_at(weights: Weights, scale: float) -> float:
        gained = (1.0 if scale > 1 else 0.0) + (
            share * needed + 0.2 * (-1) ** weights.step if scale > 3 else 0.0
        )
        return 10.0 - 5.0 * (weights.step >= 8) - gained

    run = start(30.0, loss_at).train(lambda run: run.weights.step == run.controller.plan.search_start)
    races = [decision for decision in run.decisions if decision.event in (Event.ACCEPTED, Event.FAILED)]
    assert races[0].threshold == pytest.approx(needed) and races[1].threshold == pytest.approx(
        0.4 * 0.01 * 6.0
    )
    assert 0 < races[1].gain < 2.5 * races[1].gain_error
    assert races[1].scale_after == pytest.approx(scale)


def test_climb_keeps_its_rate_after_a_worse_trial() -> None:
    def loss_at(weights: Weights, scale: float) -> float:
        batch = 0.5 * NOISE[weights.step] / 0.05
        return (
            10.0
            - 5.0 * (weights.step >= 8)
            - (1.0 if scale > 1 else 0.0)
            + (0.1 if scale > 3 else 0.0)
            + batch
        )

    run = start(30.0, loss_at).train(lambda run: run.weights.step == run.controller.plan.search_start)
    lost = next(decision for decision in run.decisions if decision.event is Event.FAILED)
    assert lost.scale_before == pytest.approx(9.0) and lost.gain < -2.5 * lost.gain_error
    assert run.controller.scale == pytest.approx(3.0)


def test_climb_keeps_a_rate_that_is_not_far_too_small() -> None:
    """A trial that is better by less than a tenth of the decrease of the loss is left to a full race."""
    run = start(30.0, lambda weights, scale: far_below(weights, scale) - 0.1 * weights.step, climb_gain=0.1)
    run.train(lambda run: run.weights.step == run.controller.plan.search_start)
    lost = next(decision for decision in run.decisions if decision.event is Event.FAILED)
    assert lost.threshold > lost.gain > 10 * lost.gain_error
    assert run.weights.path == (1.0,) * run.controller.plan.search_start


def test_full_race_follows_a_lost_climb() -> None:
    run = start(best=1.0, alpha=2.0).train()
    up = [
        decision.scale_before for decision in run.decisions if decision.event in (Event.FAILED, Event.ABORTED)
    ]
    assert [scale for scale in up if scale > 1] == [2.0, 2.0]


def test_no_climb_without_steps_before_the_races() -> None:
    plan = AdaLRSSettings(mode="robust").resolve(2000, 180)
    assert (plan.most_climbs, plan.climb_start) == (0, 180)
    assert "climb" not in str(plan) and "climb" not in str(
        AdaLRSSettings(mode="robust", climb=False).resolve(2000)
    )
    run = start(30.0, far_below, climb=False).train(lambda run: run.weights.step == 100)
    assert run.executed == 100


@pytest.mark.parametrize("cut", [100, 130, 150, 190])
def test_climb_survives_an_interruption(cut: int) -> None:
    """Interrupt the last won race of the climb, the lost one, the steps after it, and the next race."""
    whole = start(30.0, far_below, climb_gain=0.1).train()
    run = start(30.0, far_below, climb_gain=0.1).train(lambda run: run.executed == cut)
    run.apply_decision(run.controller.interrupt())
    again = run.restarted().train()
    assert 27.0 * math.sqrt(3.0) in [pytest.approx(scale) for scale in whole.weights.path]
    assert again.weights == whole.weights and again.controller.scale == whole.controller.scale
