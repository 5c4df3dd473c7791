"""Plan of the experiments."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.commands.reproduce import chosen_scale, parse
from megatron_adalrs.model.gpt import count_parameters
from megatron_adalrs.reproduction import plan
from megatron_adalrs.reproduction.plan import MAIN, Run
from tests.reproduction.made import BEST, SMOKE, TINY


def test_a_fixed_rate_is_not_run_twice() -> None:
    grid = plan.grid_runs(MAIN, ("cosine",), TINY, [10])
    rest = plan.runs_after_grid(["search"], TINY, [10], BEST)
    fixed = {run for run in rest if (run.schedule, run.method) == ("cosine", "fixed")}
    assert {run.lr for run in fixed} == {1e-4, 3e-4, 3e-3, 3e-2}
    assert fixed <= set(grid)
    assert len(rest) == len(set(rest)) == 2 * 4 * 4
    assert [run.schedule for run in rest if run.settings == plan.EQUAL_COMPUTE] == ["cosine"] * 4 + [
        "WSD"
    ] * 4


def test_only_the_chosen_methods_are_run() -> None:
    scale = chosen_scale(parse(["--scale", "tiny", "--output", "x", "--methods", "robust", "robust"]))
    runs = plan.runs_after_grid(["search", "continual", "larger-model"], scale, [10, 11], BEST)
    assert {run.method for run in runs} == {"robust"} and len(runs) == len(set(runs))
    assert any(run.settings == plan.EQUAL_COMPUTE for run in runs)
    paper = plan.runs_after_grid(["search"], replace(TINY, methods=("paper",)), [10], BEST)
    assert [(run.method, run.settings) for run in paper] == [("paper", ())] * 8


def test_the_larger_model_has_4_times_the_parameters() -> None:
    sizes = []
    for name in ("grid", "larger-model"):
        run = Run(plan.STUDIES[name].name, "cosine", "fixed", 1e-3, 0)
        sizes.append(
            count_parameters(config_from_values(plan.run_values(run, TINY) | {"data_path": "x"}).model, 257)
        )
    assert sizes[1] == pytest.approx(4 * sizes[0], rel=0.01)


def test_every_configuration_is_valid() -> None:
    for scale in (TINY, SMOKE):
        runs = plan.runs_after_grid(plan.EXPERIMENTS, scale, [10, 11], BEST)
        for run in runs:
            config_from_values(plan.run_values(run, scale) | {"data_path": "none"})
        assert {run.study for run in runs} == {"code", "prose", "wide", "continual"}
        assert {run.method for run in runs} == {"fixed", "paper", "robust", *plan.PEERS}
        assert any(dict(run.settings).get("backtrack") is False for run in runs)


def test_other_settings_have_another_name() -> None:
    run = Run("code", "cosine", "paper", 3e-3, 10)
    others = [replace(run, seed=11), replace(run, lr=1e-3), replace(run, settings=(("alpha", 2.0),))]
    names = {plan.run_name(each, plan.run_values(each, TINY)) for each in [run, *others]}
    names.add(plan.run_name(run, plan.run_values(run, replace(TINY, eval_iters=7))))
    assert len(names) == 5


def test_continual_runs_start_from_the_best_fixed_run() -> None:
    sources = plan.grid_runs(MAIN, ("cosine",), TINY, [10, 11])
    grid = plan.grid_runs(plan.CONTINUAL, ("cosine",), TINY, [10, 11], source_lr=3e-3)
    rest = plan.runs_after_grid(["continual"], TINY, [10, 11], BEST)
    assert len(grid) == 2 * 5
    assert len(set(rest)) == 2 * 3 * 3 and {run.lr for run in rest} == {1e-4, 1e-3, 1e-2}
    assert len(set(rest) & set(grid)) == 2 * 2  # at 1e-3 and 1e-2
    names = {plan.run_name(run, plan.run_values(run, TINY)): run for run in sources}
    for run in [*grid, *rest]:
        values = plan.run_values(run, TINY)
        assert names[values["finetune_from"]] == Run("code", "cosine", "fixed", 3e-3, run.seed)
        assert values["train_iters"] == 700
    of_another = replace(grid[0], source_lr=1e-3)
    assert plan.run_name(of_another, plan.run_values(of_another, TINY)) not in {
        plan.run_name(run, plan.run_values(run, TINY)) for run in grid
    }


def test_only_needed_studies_have_a_grid() -> None:
    assert plan.studies_of(["second-corpus"], TINY) == [(plan.STUDIES["second-corpus"], ("cosine",))]
    assert plan.studies_of(["factors"], TINY) == [(MAIN, ("cosine",))]
    assert plan.studies_of(["continual"], TINY) == [(MAIN, ("cosine",)), (plan.CONTINUAL, ("cosine",))]
    assert plan.studies_of(["search", "larger-model"], TINY)[0] == (MAIN, ("cosine", "WSD"))
