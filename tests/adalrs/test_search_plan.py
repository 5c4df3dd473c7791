"""Plan of a search in steps, and the largest number of steps that it discards."""

from __future__ import annotations

import random
from typing import Any, Literal

import pytest
from hypothesis import given, settings, strategies

from megatron_adalrs.adalrs.controller import build_controller
from megatron_adalrs.adalrs.search_plan import RacePlan
from megatron_adalrs.adalrs.settings import AdaLRSSettings, Mode
from tests.adalrs.race_toy import N, start


def test_race_plan_in_steps() -> None:
    search = AdaLRSSettings(mode="robust")
    assert search.resolve(10_000, 500) == RacePlan(500, 150, 1000, 4000, 150, 150, 60, 120, 40, 10_000, 500)
    assert search.resolve(400) == RacePlan(16, 16, 40, 160, 20, 20, 8, 24, 8, 400)
    text = search.describe(search.resolve(10_000))
    assert "step 150 on in races of 150 steps per arm" in text and "step 1000 to 4000" in text
    assert text.endswith("discarding at most 5000 steps in total (33.3% of all)")
    total = AdaLRSSettings(mode="robust", budget="total", max_discarded=0.2)
    assert total.describe(total.resolve(10_000)).endswith("at most 2000 steps in total (20.0% of all)")


@pytest.mark.parametrize("best", [0.001, 0.02, 0.1, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("climb", [True, False])
def test_discarded_steps_stay_within_the_plan(best: float, climb: bool) -> None:
    run = start(best, climb=climb).train()
    controller = run.controller
    assert 0 < run.executed - N <= controller.settings.most_discarded(controller.plan)


@settings(max_examples=60, deadline=None)
@given(
    mode=strategies.sampled_from(["paper", "robust"]),
    budget=strategies.sampled_from(["kept", "total"]),
    train_iters=strategies.integers(170, 900),
    warmup=strategies.sampled_from([0, 5]),
    share=strategies.sampled_from([0.5, 0.5, 0.1]),
    seed=strategies.integers(0, 10_000),
    slope=strategies.sampled_from([-1e-2, 0.0, 1e-2]),
)
def test_any_losses_cost_at_most_what_is_printed(
    mode: Mode,
    budget: Literal["kept", "total"],
    train_iters: int,
    warmup: int,
    share: float,
    seed: int,
    slope: float,
) -> None:
    search = AdaLRSSettings(mode=mode, budget=budget, max_discarded=share)
    controller = build_controller(search, train_iters, warmup)
    noise = random.Random(seed)
    level, executed = 1.0, 0
    while controller.phase != "done" and controller.step + controller.schedule_offset < train_iters:
        level = noise.choice([0.01, 1.0, 5.0]) if noise.random() < 0.02 else level
        controller.observe(9 + slope * controller.step + level * noise.gauss(0, 1))
        executed += 1
    most = search.most_discarded(search.resolve(train_iters, warmup))
    assert executed - controller.step <= most


@pytest.mark.parametrize(
    ("values", "steps", "message"),
    [
        ({}, 100, "is step 10: a race needs 16 steps before it"),
        (
            {"trial_steps": 300, "return_steps": 301},
            2000,
            "600 steps are too few for a race of .* 300 [+] 301 = 601",
        ),
        ({"window": 20}, 2000, "adalrs.window: belongs to adalrs.mode=paper"),
        ({"return_steps": 9}, 2000, "adalrs.return_steps=9 must be .* at least 10"),
        ({"max_discarded": -0.1}, 2000, "adalrs.max_discarded=-0.1"),
        ({"budget": "all"}, 2000, 'adalrs.budget=.all. must be "kept" or "total"'),
        ({"finest_factor": 1.0}, 2000, "adalrs.finest_factor=1.0 must be above 1"),
    ],
)
def test_impossible_search_is_rejected(values: dict[str, Any], steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaLRSSettings(mode="robust", **values).resolve(steps)


def test_races_begin_after_the_warm_up() -> None:
    with pytest.raises(ValueError, match="during the warm-up of 201 steps"):
        AdaLRSSettings(mode="robust").resolve(2000, 201)
