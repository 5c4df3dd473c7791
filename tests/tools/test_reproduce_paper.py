"""The paper's experiments as commands: which runs they are, what tables make of them, and all of it for real, small."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.arguments import config_from_values
from megatron_adalrs.build import build_trainer
from megatron_adalrs.model.gpt import count_parameters
from tests.distributed.ranks import Ranks
from tools.reproduction import cluster, comparison, corpus, goals, plan, results, runner, sections, tables
from tools.reproduction.comparison import Results
from tools.reproduction.options import chosen_scale, parse
from tools.reproduction.plan import MAIN, SCALES, Run
from tools.reproduction.results import Result

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(ROOT / "tools" / "reproduce_paper.py")]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
TINY, SMOKE = SCALES["tiny"], SCALES["smoke"]
BEST = {("code", "cosine"): 3e-3, ("code", "WSD"): 5e-3, ("prose", "cosine"): 3e-3, ("wide", "cosine"): 3e-3}
BEST |= {("continual", "cosine"): 1e-3}


def reproduce(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, check=False, cwd=ROOT
    )


def result(method: str, lr: float, seed: int, valid: float, **changes: Any) -> Result:
    run = Run(MAIN.name, "cosine", method, lr, seed, changes.pop("settings", ()))
    values: dict[str, Any] = {
        "name": f"{method}-{lr:g}-{seed}", "command": "python pretrain_gpt.py", "train_iters": 1000, "scale": 1.0,
        "discarded_steps": 0, "snapshot_seconds": 0.0, "wall_seconds": 10.0, "curve": ((1000, valid),),
        "velocity": 1e-3, "velocity_error": 1e-5, "window_loss": 3.0, "step_seconds": 0.01,
    }  # fmt: skip
    return Result(run=run, valid=valid, **values | changes)


# Which runs


def test_a_fixed_rate_that_is_also_an_initial_rate_is_one_run() -> None:
    grid = plan.grid_runs(MAIN, ("cosine",), TINY, [10])
    rest = plan.runs_after_grid(["search"], TINY, [10], BEST)
    fixed = {run for run in rest if (run.schedule, run.method) == ("cosine", "fixed")}
    assert {run.lr for run in fixed} == {1e-4, 3e-4, 3e-3, 3e-2}
    assert fixed <= set(grid)
    assert len(rest) == len(set(rest)) == 2 * 4 * 4
    assert [run.schedule for run in rest if run.settings == plan.EQUAL_COMPUTE] == ["cosine"] * 4 + ["WSD"] * 4


def test_only_the_methods_that_were_asked_for_are_run() -> None:
    scale = chosen_scale(parse(["--scale", "tiny", "--output", "x", "--methods", "robust", "robust"], ""))
    runs = plan.runs_after_grid(["search", "continual", "larger-model"], scale, [10, 11], BEST)
    assert {run.method for run in runs} == {"robust"} and len(runs) == len(set(runs))
    assert any(run.settings == plan.EQUAL_COMPUTE for run in runs)
    paper = plan.runs_after_grid(["search"], replace(TINY, methods=("paper",)), [10], BEST)
    assert [(run.method, run.settings) for run in paper] == [("paper", ())] * 8


def test_the_larger_model_has_four_times_the_parameters() -> None:
    sizes = []
    for name in ("grid", "larger-model"):
        run = Run(plan.STUDIES[name].name, "cosine", "fixed", 1e-3, 0)
        sizes.append(count_parameters(config_from_values(plan.run_values(run, TINY) | {"data_path": "x"}).model, 257))
    assert sizes[1] == pytest.approx(4 * sizes[0], rel=0.01)


def test_every_experiment_has_runs_with_possible_configurations() -> None:
    for scale in (TINY, SMOKE):
        runs = plan.runs_after_grid(plan.EXPERIMENTS, scale, [10, 11], BEST)
        for run in runs:
            config_from_values(plan.run_values(run, scale) | {"data_path": "none"})
        assert {run.study for run in runs} == {"code", "prose", "wide", "continual"}
        assert {run.method for run in runs} == {"fixed", "paper", "robust", *plan.PEERS}
        assert any(dict(run.settings).get("backtrack") is False for run in runs)


def test_another_setting_is_another_run() -> None:
    run = Run("code", "cosine", "paper", 3e-3, 10)
    others = [replace(run, seed=11), replace(run, lr=1e-3), replace(run, settings=(("alpha", 2.0),))]
    names = {plan.run_name(each, plan.run_values(each, TINY)) for each in [run, *others]}
    names.add(plan.run_name(run, plan.run_values(run, replace(TINY, eval_iters=7))))
    assert len(names) == 5


def test_a_continual_run_begins_with_the_weights_of_the_best_fixed_run_of_its_seed() -> None:
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


def test_only_what_the_experiments_build_on_gets_a_grid() -> None:
    assert plan.studies_of(["second-corpus"], TINY) == [(plan.STUDIES["second-corpus"], ("cosine",))]
    assert plan.studies_of(["factors"], TINY) == [(MAIN, ("cosine",))]
    assert plan.studies_of(["continual"], TINY) == [(MAIN, ("cosine",)), (plan.CONTINUAL, ("cosine",))]
    assert plan.studies_of(["search", "larger-model"], TINY)[0] == (MAIN, ("cosine", "WSD"))


def test_prose_is_docstrings() -> None:
    source = (
        '"""Top."""\nx = "no prose"\nclass A:\n    """Of a class."""\n    def f(self):\n        """Of a method."""\n'
    )
    assert corpus.prose_of(source) == "Top.\n\nOf a class.\n\nOf a method."
    assert corpus.prose_of("topics = {'a': 'long text', 'b': 'word'}", every_text=True) == "long text"
    assert corpus.prose_of("print 'of another Python'") == ""


# What tables make of them


def test_the_best_rate_is_the_lowest_mean_over_seeds_and_never_a_diverged_one() -> None:
    runs = [result("fixed", 1e-3, 0, 2.0), result("fixed", 1e-3, 1, 2.2), result("fixed", 3e-3, 0, 1.9)]
    runs += [result("fixed", 3e-3, 1, 2.4), result("fixed", 1e-2, 0, 1.0), result("fixed", 1e-2, 1, math.inf)]
    assert Results(runs).best_rate("code", "cosine") == 1e-3
    assert Results(runs).best_rate("code", "cosine", among=[3e-3, 1e-2]) == 3e-3
    with pytest.raises(ValueError, match="no run at a fixed rate ended with a finite loss"):
        Results(runs[-1:]).best_rate("code", "cosine")


@pytest.mark.parametrize(("best", "is_told"), [(1e-3, True), (3e-3, False), (1e-2, True)])
def test_a_best_rate_at_an_end_of_the_grid_is_told(best: float, is_told: bool) -> None:
    grid = Results([result("fixed", lr, 10, 2.0 + (lr != best)) for lr in (1e-3, 3e-3, 1e-2)])
    caption = tables.grid_table(grid, MAIN, "cosine", grid.best_rate("code", "cosine")).caption
    assert (f"{best:g}, is at an end of the grid" in caption) is is_told


def test_differences_are_between_runs_of_one_seed() -> None:
    assert comparison.differences({1: result("paper", 1, 1, 2.5), 2: result("paper", 1, 2, 9.0)}, {}) == []
    references = {1: result("fixed", 1, 1, 2.0), 3: result("fixed", 1, 3, 1.0)}
    assert comparison.differences({1: result("paper", 1, 1, 2.5)}, references) == [0.5]


@pytest.mark.parametrize(("loss", "steps"), [(5.0, 100.0), (3.5, 250.0), (3.0, 300.0), (2.0, None)])
def test_steps_to_reach_a_loss_are_read_off_the_validation_curve(loss: float, steps: float | None) -> None:
    run = result("robust", 1, 0, 3.5, curve=((100, 5.0), (200, 4.0), (300, 3.0), (400, 3.5)))
    assert comparison.steps_to_reach(run, loss) == steps


def test_the_search_table_has_mean_worst_discarded_and_goals() -> None:
    runs = [result("fixed", 3e-3, seed, 2.0 + seed) for seed in (0, 1)]
    runs += [result("fixed", 3e-4, seed, 2.5 + seed) for seed in (0, 1)]
    runs += [
        result("robust", 3e-4, 0, 2.01, discarded_steps=100, scale=9.0, curve=((500, 2.5), (1100, 2.01))),
        result("robust", 3e-4, 1, 3.11, discarded_steps=300, scale=4.0, curve=((500, 3.9), (1300, 3.11))),
        result("robust", 3e-4, 0, 2.04, settings=plan.EQUAL_COMPUTE),
        result("paper", 3e-4, 0, 2.4), result("paper", 3e-4, 1, 3.5),
    ]  # fmt: skip
    table = tables.search_table(Results(runs), MAIN, "cosine", (1 / 10, 1), 3e-3)
    rows = {row[0]: row[1:] for row in table.rows}
    assert table.head == ("initial rate / best fixed", "1/10", "1")
    assert rows["fixed, mean"] == ("+0.500", "+0.000")
    assert rows["robust, mean"] == ("+0.060 [≤ 0.02]*", "–")
    assert rows["robust, worst"] == ("+0.110 [≤ 0.05]*", "–")
    assert rows["robust, discarded"] == ("20.0% [≤ 15%]*", "–")
    assert rows["robust, rate found"] == ("0.60", "–")
    # 0.5 at once, and 500 + 800 x 0.4 / 0.79 = 905 of 1000 steps
    assert rows["robust, steps to the fixed rate's loss"] == ("70% [≤ 50%]*", "–")
    assert rows["paper, steps to the fixed rate's loss"] == ("100%", "–")
    assert rows["robust, equal compute"] == ("+0.040 [≤ 0.05]", "–")
    assert rows["paper, improvement"] == ("+0.050 [≥ 0.05]", "–")
    assert "| robust, mean | +0.060 [≤ 0.02]* | – |" in table.markdown()
    caption = table.caption.split("missed. ")[1]
    told = "{} mode ended above the initial rate held fixed in {}; it discarded {} of train_iters on average."
    assert caption == f"{told.format('Paper', '0 of 2 runs', '0%')} {told.format('Robust', '0 of 2 runs', '20%')}"
    worse = Results([*runs[:4], result("robust", 3e-4, 0, 2.6)])
    harmed = goals.findings(worse, MAIN, "cosine", (1 / 10,), 3e-3)
    assert harmed == told.format("Robust", "1 of 1 runs, by up to 0.100 (from 1/10)", "0%")


def test_a_search_that_never_gets_there_and_one_that_diverges_are_told_as_such() -> None:
    runs = [result("fixed", 3e-3, 0, 2.0), result("paper", 3e-3, 0, math.inf, curve=((500, 3.0), (1000, math.inf)))]
    table = tables.search_table(Results(runs), MAIN, "cosine", (1,), 3e-3)
    rows = {row[0]: row[1] for row in table.rows}
    assert rows["paper, mean"] == "+inf"
    assert rows["paper, steps to the fixed rate's loss"] == "never (0 of 1)"


def test_the_report_has_a_section_for_every_experiment() -> None:
    seeds, runs = (10,), []
    grid = plan.grid_runs(MAIN, ("cosine", "WSD"), TINY, seeds)
    grid += plan.grid_runs(plan.CONTINUAL, ("cosine",), TINY, seeds, 3e-3)
    best = BEST | {("code", "WSD"): 3e-3, ("continual", "cosine"): 3e-3}
    for run in [*grid, *plan.runs_after_grid(plan.EXPERIMENTS[:-2], TINY, seeds, best)]:
        valid = 2.0 + abs(math.log10(run.lr / 3e-3))
        ramp = {"scale": 0.02, "discarded_steps": 100} if run.method in plan.RANGE_TESTS else {}
        runs.append(replace(result(run.method, run.lr, run.seed, valid, **ramp), run=run))
    made = sections.sections_of(Results(runs), plan.EXPERIMENTS[:-2], TINY)
    titles = [section.table.title for section in made]
    assert titles == [
        "Fixed rates: code, cosine", "Fixed rates: code, WSD", "Fixed rates: continual, cosine",
        "Searches: code, cosine, 1 seed",
        "What a search costs: code, cosine", "Searches: code, WSD, 1 seed", "What a search costs: code, WSD",
        "With and without backtracking", "Factors", "Windows and decay of the factors",
        "Searches: continual, cosine, 1 seed", "What a search costs: continual, cosine", "Peers: code",
    ]  # fmt: skip
    assert "backtrack off" in made[7].table.markdown()
    assert "alpha 2, beta 1.67" in made[8].table.markdown()
    assert "700 steps on prose from the weights that 2000 steps on code at the best fixed rate (0.003," in (
        made[10].table.markdown()
    )
    assert "| lr-range-test-tenth | cosine | found: 0.02 | +2.523 [+2.523] | 10.0% |" in made[12].table.markdown()
    assert "| schedulefree | constant | 0.003 |" in made[12].table.markdown()
    drawn = [trace.name for trace in made[0].figure.data if trace.name]
    assert drawn == [
        "final validation loss", "its optimum: 0.003", "velocity in the search window", "its optimum: 0.0001",
    ]  # fmt: skip


# Real runs


def test_smoke_killed_and_called_again_runs_only_what_is_missing(tmp_path: Path) -> None:
    arguments = ["--scale", "smoke", "--rates", "3e-3", "--initial-rates", "1"]
    arguments += ["--experiments", "search", "continual"]
    arguments += ["--jobs", "2", "--output", str(tmp_path / "out")]
    with subprocess.Popen([*PROGRAM, *arguments], env=ENVIRONMENT, cwd=ROOT, start_new_session=True) as first:
        deadline = time.monotonic() + 300
        while not (done := list(tmp_path.glob("out/runs/*fixed*/result.json"))) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(first.pid, signal.SIGKILL)
    kept = done[0].stat().st_mtime_ns

    again = reproduce(*arguments)
    assert (again.returncode, again.stderr) == (0, "")
    assert "1 runs, 1 of them complete" in again.stdout
    assert done[0].stat().st_mtime_ns == kept
    assert "| fixed, mean | +0.000 |" in again.stdout

    found = [results.load(file) for file in sorted(tmp_path.glob("out/runs/*/result.json"))]
    methods = [(each.run.study, each.run.method) for each in found]
    assert methods == [("code", name) for name in ("fixed", "paper", "robust", "robust")] + [
        ("continual", name) for name in ("fixed", "fixed", "paper", "robust")
    ]
    by_method = {each.run.method: each for each in found if not each.run.settings and not each.run.source}
    assert by_method["robust"].discarded_steps > 0
    assert by_method["fixed"].discarded_steps == 0
    assert len(by_method["fixed"].curve) == 20
    assert by_method["fixed"].velocity > 0
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [float(row["valid"]) for row in rows] == [
        each["valid"] for each in json.loads((tmp_path / "out" / "results.json").read_text())
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Searches: code, cosine, 1 seed" in page
    assert "pretrain_gpt.py --config" in page
    weights = {json.loads(file.read_text().splitlines()[0])["weights_from"] for file in
               tmp_path.glob("out/runs/continual-*/metrics.jsonl")}  # fmt: skip
    assert weights == {str(tmp_path / "out" / "runs" / by_method["fixed"].name / "checkpoints" / "iter_0000200")}
    assert reproduce(*arguments).stdout.count("7 runs, 7 of them complete") == 1


def test_adamw_in_the_plain_loop_gives_the_trainers_losses(one_rank: Ranks, tmp_path: Path) -> None:
    (ours, plain) = one_rank.run(losses_of_both, str(tmp_path))[0]
    assert len(ours) == 12
    assert plain == pytest.approx(ours, abs=1e-6)


def losses_of_both(folder: str) -> tuple[list[float], list[float]]:
    """Training and validation losses of a run through the trainer, and of the same in the plain loop."""
    from tools.reproduction import peers

    corpus.prepare_corpora(Path(folder), {"code"}, limit_mb=0.3)
    values = plan.run_values(Run("code", "cosine", "fixed", 3e-3, 10), replace(SMOKE, train_iters=10))
    values |= {"data_path": f"{folder}/code", "eval_interval": 5, "eval_iters": 2}
    assert build_trainer(config_from_values(values | {"run_dir": f"{folder}/ours"})).train() == 0
    peers.train(config_from_values(values | {"run_dir": f"{folder}/plain"}), "adamw")

    def losses(name: str) -> list[float]:
        records = map(json.loads, Path(folder, name, "metrics.jsonl").read_text().splitlines())
        return [r["loss"] for r in records if r["kind"] == "train" or (r["kind"] == "eval" and r["split"] == "valid")]

    return losses("ours"), losses("plain")


@pytest.mark.parametrize("kind", plan.RANGE_TESTS)
def test_what_a_range_test_finds_is_read_off_its_losses(kind: str) -> None:
    from tools.reproduction import peers

    rates = [1e-6 * 10 ** (n / 10) for n in range(60)]  # to 1, ten a decade
    losses = [5.0 - 2 / (1 + math.exp(30 - n)) + 0.01 * abs(n - 45) for n in range(60)]  # fall at 1e-3, rise from 3e-2
    expected = {"lr-range-test-steepest": 1e-3, "lr-range-test-tenth": 3e-3}[kind]
    for ending in ([], [math.inf, math.nan, 1.0]):
        found = peers.found_rate(kind, [*rates, 1, 1, 1][: 60 + len(ending)], losses + ending, 3)
        assert expected / 1.6 < found < 1.6 * expected
    with pytest.raises(ValueError, match=r"blew up after 7 steps, at a rate of 4e-06"):
        peers.found_rate(kind, rates, [*losses[:7], math.nan, *losses[7:]], 3)


def test_a_range_test_is_thrown_away_and_its_steps_are_counted(one_rank: Ranks, tmp_path: Path) -> None:
    log = one_rank.run(after_a_range_test, str(tmp_path))[0]
    lr, loss, scale, kept, discarded = log
    assert (kept, discarded) == ([False] * 50 + [True] * 60, 50)
    assert lr[0] == pytest.approx(0.5e-6) and lr[49] == pytest.approx(0.5)
    assert lr[10] / lr[9] == pytest.approx(lr[49] / lr[48])
    assert loss[50] == loss[0] != loss[1], "the run does not begin with the weights and the batch of the test"
    assert max(lr[50:]) == pytest.approx(0.5 * scale) and lr[0] < 0.5 * scale < lr[49]


def after_a_range_test(folder: str) -> tuple[list[float], list[float], float, list[bool], int]:
    """Rates and losses, the factor that was found, which steps were kept, and how many were not."""
    from megatron_adalrs.run_log import read_run
    from tools.reproduction import peers

    corpus.prepare_corpora(Path(folder), {"code"}, limit_mb=0.3)
    scale = replace(SMOKE, train_iters=60, eval_iters=2)
    values = plan.run_values(Run("code", "cosine", "lr-range-test-tenth", 0.5, 10), scale)
    values |= {"data_path": f"{folder}/code", "run_dir": f"{folder}/run", "lr_warmup_iters": 0}
    peers.train(config_from_values(values), "lr-range-test-tenth")
    log = read_run(Path(folder, "run"))
    train = log.train
    return train.lr.tolist(), train.loss.tolist(), log.scale, train.kept.tolist(), log.totals.discarded_steps


def test_a_folder_is_worked_in_by_one_process_at_a_time(tmp_path: Path) -> None:
    with runner.lock(tmp_path), pytest.raises(ValueError, match=r"another reproduction works in it"):
        runner.lock(tmp_path, patience=0)
    runner.lock(tmp_path).close()


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    told: list[str] = []
    with runner.lock(tmp_path) as held:
        failing = runner.Runner(tmp_path, SMOKE, {"code": tmp_path / "none"}, 2, held)
        assert failing.execute([Run("code", "cosine", "fixed", 3e-3, 10)], told.append) == []
    (reason,) = failing.failures.values()
    assert reason.startswith("exit code 2: error: ")
    assert "failed" in told[-1]


# On a cluster


def test_a_cluster_gets_a_script_and_its_runs_are_collected(tmp_path: Path) -> None:
    output = tmp_path / "out"
    corpus.prepare_corpora(tmp_path, {"code"}, limit_mb=0.1)
    made = reproduce("--scale", "7b", "--output", output, "--data-path", tmp_path / "code", "--schedules", "WSD")
    assert (made.returncode, made.stderr) == (0, "")
    subprocess.run(["bash", "-n", output / "launch.sh"], check=True)
    planned = json.loads((output / "runs.json").read_text())
    assert len(planned) == len(list(output.glob("configs/*.yaml"))) == 9
    assert (output / "launch.sh").read_text().count("\ntrain qwen2.5-7b-WSD-") == 9

    nothing = reproduce("--scale", "7b", "--output", output, "--collect")
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert "none of the 9 runs" in nothing.stderr
    for entry in planned[:2]:
        leave_records(output / "runs" / entry["name"])
    collected = reproduce("--scale", "7b", "--output", output, "--collect")
    assert (collected.returncode, collected.stderr) == (0, "")
    page = (output / "report.html").read_text()
    assert "2 runs complete, 7 not" in page
    assert "Fixed rates: qwen2.5-7b, WSD" in page
    assert len(cluster.collect_cluster(output)[0]) == 2


def leave_records(folder: Path) -> None:
    """What a finished run of ten steps leaves."""
    train = {"kind": "train", "lr": 1.0, "scale": 1.0, "consumed_tokens": 1, "discarded_tokens": 0, "phase": "fixed"}
    records = [train | {"step": n, "total_steps": n, "loss": 5.0 - n / 10, "time": n} for n in range(1, 11)]
    end = {"step": 10, "total_steps": 10, "time": 11}
    records.append({"kind": "eval", "split": "valid", "loss": 4.0, "perplexity": 55.0, **end})
    records.append({"kind": "run", "event": "end", **end})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "tiny", "--seeds", "0"], "--seeds: 0: at least 1 is required"),
        (["--scale", "tiny", "--first-seed", "-1"], "--first-seed: -1: at least 0 is required"),
        (["--scale", "tiny", "--jobs", "0"], "--jobs: 0: at least 1 is required"),
        (["--scale", "tiny", "--initial-rates", "1/0"], "--initial-rates: '1/0': a number or a fraction"),
        (["--scale", "1.5b", "--data-path", "x", "--methods", "paper"], "--methods: not with --scale 1.5b"),
        (["--scale", "tiny", "--initial-rates", "0"], "--initial-rates: 0: a number above 0"),
        (["--scale", "tiny", "--rates", "-1"], "--rates: -1: a number above 0"),
        (["--scale", "tiny", "--experiments", "nonsense"], "invalid choice: 'nonsense'"),
        (["--scale", "tiny", "--collect"], "--collect: not with --scale tiny"),
        (["--scale", "7b", "--experiments", "grid", "--collect"], "--experiments: not with --scale 7b"),
        (["--scale", "7b"], "--data-path: --scale 7b needs either a corpus or --collect"),
        (["--scale", "7b", "--data-path", "nowhere"], "--data-path: nowhere: there is no "),
        (["--scale", "7b", "--collect"], "has no runs.json"),
        (["--scale", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = reproduce(*arguments, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "error: " in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError, match=r"result\.json: not a result of this tool"):
        results.load(tmp_path / "result.json")
