"""Plan of a search in steps, and the largest number of steps that it discards."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_adalrs.adalrs.search_plan import RacePlan
from megatron_adalrs.adalrs.settings import AdaLRSSettings
from tests.adalrs.race_toy import N, start


def test_race_plan_in_steps() -> None:
    settings = AdaLRSSettings(mode="robust")
    assert settings.resolve(10_000, 500) == RacePlan(500, 150, 1000, 4000, 150, 150, 60, 120, 40, 10_000, 500)
    assert settings.resolve(400) == RacePlan(16, 16, 40, 160, 20, 20, 8, 24, 8, 400)
    text = str(settings.resolve(10_000))
    assert "step 150 on in races of 150 steps per arm, discarding at most 750 steps (7.5%)" in text
    assert "step 1000 to 4000" in text and "at most 3000 steps (30.0%)" in text
    assert "2380 more (23.8%) for a restart" in text and "1240 for each further one" in text


@pytest.mark.parametrize("best", [0.001, 0.02, 0.1, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("climb", [True, False])
def test_discarded_steps_stay_within_the_plan(best: float, climb: bool) -> None:
    run = start(best, climb=climb).train()
    plan = str(run.controller.plan)
    most = sum(map(int, re.findall(r"(?:at most|too large,) (\d+) (?:steps|more)", plan)))
    further = int(re.findall(r"(\d+) for each further one", plan)[0])
    new_runs = sum(decision.restore == "initial" for decision in run.decisions)
    assert 0 < run.executed - N <= most + max(0, new_runs - 2) * further


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
