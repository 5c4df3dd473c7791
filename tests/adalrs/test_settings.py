from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import subprocess
import sys
from typing import Any, Literal

import docstring_parser
import pytest

from megatron_adalrs.adalrs.controller import build_controller
from megatron_adalrs.adalrs.search_plan import SearchPlan
from megatron_adalrs.adalrs.settings import AdaLRSSettings, Mode, uses_setting


@pytest.mark.parametrize(
    ("field", "value", "requirement"),
    [
        ("mode", "fast", '"off", "paper" or "robust"'),
        ("alpha", 1.0, "above 1"),
        ("alpha", math.inf, "finite"),
        ("beta", 0.5, "above 1"),
        ("beta", "2", "finite number"),
        ("decay", 0.0, "above 0 and at most 1"),
        ("decay", 1.01, "above 0 and at most 1"),
        ("decay", math.nan, "finite"),
        ("window", 2, "at least 3"),
        ("window", 10.5, "whole number"),
        ("window", True, "whole number"),
        ("search_start", -0.1, "between 0 and 1"),
        ("search_end", 0.1, "above adalrs.search_start=0.1"),
        ("search_end", 1.1, "at most 1"),
        ("decay_threshold", 0.0, "above 0"),
        ("on_fail", "up", '"down" or "stay"'),
        ("min_scale", 0.0, "above 0"),
        ("min_scale", 2.0, "at most 1"),
        ("max_scale", 0.9, "at least 1"),
        ("max_scale", math.inf, "finite"),
    ],
)
def test_value_out_of_range_is_rejected_by_name(field: str, value: Any, requirement: str) -> None:
    with pytest.raises(ValueError) as rejected:
        AdaLRSSettings(**{"mode": "paper", field: value})
    message = str(rejected.value)
    assert message.startswith(f"adalrs.{field}={value!r} must be")
    assert requirement in message


@pytest.mark.parametrize("mode", ["paper", "robust"])
def test_settings_of_the_other_mode_are_refused(mode: Mode) -> None:
    changed = {"window": 30, "beta": 3.0, "backtrack": False, "trial_steps": 30, "climb": False}
    owners = {name: "paper" if name in ("window", "beta", "backtrack") else "robust" for name in changed}
    for name, value in changed.items():
        if owners[name] == mode:
            AdaLRSSettings(**{"mode": mode, name: value})
            continue
        with pytest.raises(ValueError, match=rf"adalrs\.{name}: belongs to adalrs\.mode={owners[name]}"):
            AdaLRSSettings(**{"mode": mode, name: value})


def test_settings_without_a_mode_are_refused() -> None:
    with pytest.raises(ValueError, match=r"adalrs\.window: .*choose --adalrs\.mode paper"):
        AdaLRSSettings(window=20)
    with pytest.raises(ValueError, match=r"adalrs\.alpha: .*--adalrs\.mode robust or --adalrs\.mode paper"):
        AdaLRSSettings(alpha=2.0)


def field_help(name: str) -> str:
    helps = {p.arg_name: p.description for p in docstring_parser.parse_from_object(AdaLRSSettings).params}
    return helps[name] or ""


def test_every_setting_names_the_modes_using_it() -> None:
    for field in dataclasses.fields(AdaLRSSettings):
        text = field_help(field.name)
        modes = [mode for mode in ("paper", "robust") if uses_setting(mode, field.name)]
        assert not uses_setting("off", field.name) or field.name == "mode"
        assert text.startswith({"paper": "Paper mode:", "robust": "Robust mode:"}[modes[0]]) == (
            len(modes) == 1
        )


def test_robust_mode_requires_backtracking() -> None:
    with pytest.raises(ValueError, match=r"adalrs\.backtrack: belongs to adalrs\.mode=paper"):
        AdaLRSSettings(mode="robust", backtrack=False)


def test_no_snapshot_without_backtracking() -> None:
    plan = AdaLRSSettings(mode="paper", backtrack=False).resolve(2000)
    assert plan.live_snapshots == 0
    assert plan.most_in_trials == 0


def test_plan_is_in_steps() -> None:
    plan = AdaLRSSettings(mode="paper").resolve(2000, warmup_iters=60)
    assert plan == SearchPlan(window=50, search_start=200, search_end=800, train_iters=2000)
    assert plan.watch_start == 100


def test_default_window_is_a_fortieth_of_the_run() -> None:
    assert AdaLRSSettings(mode="paper").resolve(100_000).window == 2500
    assert AdaLRSSettings(mode="paper").resolve(400).window == 20
    assert AdaLRSSettings(mode="paper", window=7).resolve(400).window == 7


def test_watch_before_step_0_is_rejected() -> None:
    with pytest.raises(ValueError) as rejected:
        AdaLRSSettings(mode="paper", window=60).resolve(1000)
    message = str(rejected.value)
    for part in ("adalrs.search_start=0.1", "train_iters=1000", "step 100", "adalrs.window=60", "step -20"):
        assert part in message


def test_watch_inside_the_warm_up_is_rejected() -> None:
    settings = AdaLRSSettings(mode="paper", window=50)
    assert settings.resolve(2000, warmup_iters=100).watch_start == 100
    with pytest.raises(
        ValueError, match=r"begins at step 100, during the warm-up of 101 steps.*search-start"
    ):
        settings.resolve(2000, warmup_iters=101)


def test_range_too_short_for_a_trial_is_rejected() -> None:
    settings = AdaLRSSettings(mode="paper", window=50, search_start=0.1, search_end=0.12)
    with pytest.raises(ValueError, match=r"steps 200 to 240: 40 steps are too few .*adalrs\.window=50"):
        settings.resolve(2000)
    assert settings.resolve(2500).search_end == 300


def test_run_has_at_least_one_step() -> None:
    with pytest.raises(ValueError, match=r"train_iters=0 must be at least 1"):
        AdaLRSSettings(mode="paper").resolve(0)


def test_factors_decay_to_1_with_the_adjustments() -> None:
    settings = AdaLRSSettings(mode="paper", alpha=3.0, beta=2.0, decay=0.9)
    assert settings.raise_factor(0) == 3.0
    assert settings.raise_factor(2) == pytest.approx(2.43)
    assert settings.raise_factor(50) == 1.0
    assert settings.cut_factor(0) == 0.5
    assert settings.cut_factor(1) == pytest.approx(1 / 1.8)
    assert settings.cut_factor(50) == 1.0


def test_the_algorithm_runs_without_torch() -> None:
    code = (
        "import sys, megatron_adalrs.adalrs as a\n"
        "c = a.build_controller(a.AdaLRSSettings(mode='paper'), 1000)\n"
        "for i in range(1000): c.observe(5.0 - 1e-3 * i)\n"
        "print('torch' in sys.modules, 'deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("train_iters", [200, 300, 400, 1000])
@pytest.mark.parametrize("mode", ["paper", "robust"])
def test_short_runs_need_no_further_flags(mode: Mode, train_iters: int) -> None:
    AdaLRSSettings(mode=mode).resolve(train_iters)


@pytest.mark.parametrize("warmup", [0, 7, 60, 150])
@pytest.mark.parametrize("train_iters", [40, 90, 150, 300, 777, 2000])
@pytest.mark.parametrize("mode", ["paper", "robust"])
def test_flags_of_the_message_work(mode: Mode, train_iters: int, warmup: int) -> None:
    try:
        AdaLRSSettings(mode=mode).resolve(train_iters, warmup)
    except ValueError as error:
        found = re.search(r"use --adalrs.search-start (\S+) --adalrs.search-end (\S+)$", str(error))
        if not found:
            assert "raise train_iters" in str(error)
            return
        start, end = map(float, found.groups())
        AdaLRSSettings(mode=mode, search_start=start, search_end=end).resolve(train_iters, warmup)


@pytest.mark.parametrize("budget", ["kept", "total"])
@pytest.mark.parametrize("mode", ["paper", "robust"])
def test_run_is_extended_after_its_search(mode: Mode, budget: Literal["kept", "total"]) -> None:
    settings = AdaLRSSettings(mode=mode, budget=budget)
    controller = build_controller(settings, 1000)
    noise = random.Random(0)
    states = []
    while controller.phase != "done":
        controller.observe(5 - 2e-3 * controller.step + noise.gauss(0, 0.01))
        if not controller.has_pending_rollback:
            states.append(json.loads(json.dumps(controller.state_dict())))
    longer = build_controller(settings, 1500)
    with pytest.raises(ValueError, match=r"train_iters=1500, .*still running, until about step 400"):
        longer.load_state_dict(states[0])
    for train_iters in (1500, 3000):
        longer = build_controller(settings, train_iters)
        longer.load_state_dict(states[-1])
        assert (longer.scale, longer.step) == (controller.scale, states[-1]["step"])
        assert longer.schedule_offset == controller.schedule_offset
        assert longer.observe(9.0).event is None and longer.phase == "done"
        states.append(longer.state_dict())
        longer.reset_scale()  # a changed --lr
        assert (longer.observe(9.0).scale_after, longer.state_dict()["scale"]) == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"adalrs\.search_end=0\.5, .*settings it began with"):
        build_controller(dataclasses.replace(settings, search_end=0.5), 1500).load_state_dict(states[-1])
