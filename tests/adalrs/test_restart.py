"""The restart race of robust mode: a new run from the initial weights at a lower rate."""

from __future__ import annotations

import math

import pytest

from megatron_adalrs.adalrs.controller import Event
from tests.adalrs.race_toy import NOISE, N, Weights, at_fixed_rate, far_below, start


def test_damaging_rate_is_lowered_from_the_first_step() -> None:
    run = start(best=0.1).train()
    assert not run.weights.damaged
    assert run.weights.path[0] == pytest.approx(1 / 9) or run.weights.path[0] == pytest.approx(1 / 27)
    assert run.weights.level < at_fixed_rate(0.1).level - 0.5
    assert run.executed - N == sum(decision.discarded_steps for decision in run.decisions)


def test_climb_at_too_large_a_rate_restarts_at_once() -> None:
    """A full race after the damage is won here, and would hide that the rate is too large."""

    def loss_at(weights: Weights, scale: float) -> float:
        return weights.loss(scale) - (0.5 if weights.step > 100 and max(weights.path) > 1.5 else 0.0)

    run = start(0.1, loss_at, finest_factor=1.5, alpha=3.0).train()
    restarts = [index for index, decision in enumerate(run.decisions) if decision.restore == "initial"]
    full = [index for index, decision in enumerate(run.decisions) if "steps, then at" in decision.reason]
    assert 0 < restarts[0] < full[0]
    won = next(decision for decision in run.decisions if decision.event is Event.ACCEPTED)
    assert won.step == run.controller.plan.climb_start + run.controller.plan.climb_steps
    assert run.controller.scale < 1 and not run.weights.damaged
    late = start(0.1, loss_at, climb=False).train()
    assert late.controller.scale > 1 and late.weights.damaged


@pytest.mark.parametrize(("behind", "again"), [(0.3, True), (1.0, False)])
def test_narrowly_lost_early_restart_is_repeated(behind: float, again: bool) -> None:
    """The damage shows late: a new run is first above the old one, whose loss has fallen by 2, then below."""

    def loss_at(weights: Weights, scale: float) -> float:
        is_new = weights.path[:1] < (1.0,)
        off = (behind if weights.step < 36 else -0.5) if is_new else 0.0
        return (
            5.0 - 0.06 * min(weights.step, 50) + off + (0.3 if scale > 1 else 0.0) + 0.1 * NOISE[weights.step]
        )

    run = start(1.0, loss_at).train()
    new_runs = [decision.step for decision in run.decisions if decision.restore == "initial"]
    assert len(new_runs) >= 2 if again else len(new_runs) == 1
    assert run.weights.path[0] < 1 if again else run.weights.path == (1.0,) * N


def test_lost_climb_after_a_restart_does_not_restart() -> None:
    """The rate has been raised to the initial scale, so this scale is not too large."""

    def loss_at(weights: Weights, scale: float) -> float:
        loss = 5.0 - 0.03 * min(weights.step, 30) - 0.005 * weights.step + 0.1 * NOISE[weights.step]
        loss += (0.5 if scale > 1 else 0.0) + (3.0 if scale < 0.05 else 0.0)
        loss += 0.05 if weights.path[:1] == (1.0,) and scale < 1 else 0.0
        return loss - (0.2 * (1 + (scale > 0.5)) if weights.step >= 32 and 0.2 < scale <= 1 else 0.0)

    run = start(1.0, loss_at).train()
    restart, *climbed = [decision for decision in run.decisions if decision.event is Event.ACCEPTED]
    assert "new run" in restart.reason
    assert [decision.scale_after for decision in climbed] == pytest.approx([1 / 3, 1.0])
    assert sum(decision.restore == "initial" for decision in run.decisions) == 2


@pytest.mark.parametrize("share", [0.19, 0.2, 0.21])
def test_initial_weights_are_kept_within_the_budget(share: float) -> None:
    """A trial that ends early uses less of the budget than was reserved for it."""

    def loss_at(weights: Weights, scale: float) -> float:
        return (
            5.0
            - 0.03 * min(weights.step, 30)
            - 0.005 * weights.step
            + 0.1 * NOISE[weights.step]
            + 3 * (scale > 1)
        )

    run = start(1.0, loss_at, max_discarded=share).train()
    assert run.controller.phase == "done" and run.executed - N <= share * N
    assert any(decision.restore == "initial" for decision in run.decisions) is (share > 0.19)


def test_undecided_climb_is_followed_by_a_full_race() -> None:
    run = start(1.0, lambda weights, scale: 5.0 - 0.001 * weights.step + NOISE[weights.step]).train()
    restart = next(index for index, decision in enumerate(run.decisions) if decision.restore == "initial")
    assert any("steps, then at" in decision.reason for decision in run.decisions[:restart])
    assert sum(decision.restore == "initial" for decision in run.decisions) == 1


def test_raised_rate_is_not_restarted_lower() -> None:
    run = start(30.0, far_below).train(
        lambda run: run.controller.scale > 1 and run.controller.phase == "control"
    )
    assert not run.controller.needs_initial
    run.train()
    assert not any(decision.restore == "initial" for decision in run.decisions)


def test_run_with_nan_losses_restarts_lower() -> None:
    def loss_at(weights: Weights, scale: float) -> float:
        return weights.loss(scale) if scale < 0.2 else math.nan

    run = start(best=0.1, loss_at=loss_at).train()
    assert max(run.weights.path) < 0.2


def test_lost_restart_returns_to_the_control() -> None:
    run = start(best=1.0).train()
    events = run.events()
    assert "caught_up" in events or "aborted" in events
    assert run.weights.path == (1.0,) * N


@pytest.mark.parametrize("values", [{"min_scale": 1.0}, {"max_discarded": 0.15}], ids=str)
def test_no_initial_weights_without_a_restart(values: dict[str, float]) -> None:
    run = start(best=0.1, **values).train()
    assert (
        not any(decision.capture == "initial" for decision in run.decisions) and min(run.weights.path) == 1.0
    )
    assert any(decision.capture == "initial" for decision in start(best=0.1).train().decisions)
