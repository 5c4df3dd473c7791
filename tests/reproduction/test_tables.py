"""Tables and sections of the report."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_adalrs.reproduction import plan, report, results, search_table, tables
from megatron_adalrs.reproduction.plan import MAIN
from megatron_adalrs.reproduction.results import Results
from tests.reproduction.made import BEST, TINY, result


def test_the_best_rate_has_the_lowest_finite_mean() -> None:
    runs = [result("fixed", 1e-3, 0, 2.0), result("fixed", 1e-3, 1, 2.2), result("fixed", 3e-3, 0, 1.9)]
    runs += [result("fixed", 3e-3, 1, 2.4), result("fixed", 1e-2, 0, 1.0), result("fixed", 1e-2, 1, math.inf)]
    assert Results(runs).best_rate("code", "cosine") == 1e-3
    assert Results(runs).best_rate("code", "cosine", among=[3e-3, 1e-2]) == 3e-3
    with pytest.raises(ValueError, match="no run at a fixed rate ended with a finite loss"):
        Results(runs[-1:]).best_rate("code", "cosine")


@pytest.mark.parametrize(("best", "warns"), [(1e-3, True), (3e-3, False), (1e-2, True)])
def test_a_best_rate_at_an_end_of_the_grid_warns(best: float, warns: bool) -> None:
    grid = Results([result("fixed", lr, 10, 2.0 + (lr != best)) for lr in (1e-3, 3e-3, 1e-2)])
    caption = tables.grid_table(grid, MAIN, "cosine", grid.best_rate("code", "cosine")).caption
    assert (f"{best:g}, is at an end of the grid" in caption) is warns


def test_differences_compare_runs_of_one_seed() -> None:
    assert results.differences({1: result("paper", 1, 1, 2.5), 2: result("paper", 1, 2, 9.0)}, {}) == []
    references = {1: result("fixed", 1, 1, 2.0), 3: result("fixed", 1, 3, 1.0)}
    assert results.differences({1: result("paper", 1, 1, 2.5)}, references) == [0.5]


@pytest.mark.parametrize(("loss", "steps"), [(5.0, 100.0), (3.5, 250.0), (3.0, 300.0), (2.0, None)])
def test_steps_to_reach_a_loss_are_interpolated(loss: float, steps: float | None) -> None:
    run = result("robust", 1, 0, 3.5, curve=((100, 5.0), (200, 4.0), (300, 3.0), (400, 3.5)))
    assert results.steps_to_reach(run, loss) == steps


def test_the_search_table_compares_with_the_goals() -> None:
    runs = [result("fixed", 3e-3, seed, 2.0 + seed) for seed in (0, 1)]
    runs += [result("fixed", 3e-4, seed, 2.5 + seed) for seed in (0, 1)]
    runs += [
        result("robust", 3e-4, 0, 2.01, discarded_steps=100, scale=9.0, curve=((500, 2.5), (1100, 2.01))),
        result("robust", 3e-4, 1, 3.11, discarded_steps=300, scale=4.0, curve=((500, 3.9), (1300, 3.11))),
        result("robust", 3e-4, 0, 2.04, settings=plan.EQUAL_COMPUTE),
        result("paper", 3e-4, 0, 2.4),
        result("paper", 3e-4, 1, 3.5),
    ]
    table = search_table.search_table(Results(runs), MAIN, "cosine", (1 / 10, 1), 3e-3)
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
    text = "{} mode ended above the initial rate held fixed in {}; it discarded {} of train_iters on average."
    assert (
        caption
        == f"{text.format('Paper', '0 of 2 runs', '0%')} {text.format('Robust', '0 of 2 runs', '20%')}"
    )
    worse = Results([*runs[:4], result("robust", 3e-4, 0, 2.6)])
    harmed = search_table.findings(worse, MAIN, "cosine", (1 / 10,), 3e-3)
    assert harmed == text.format("Robust", "1 of 1 runs, by up to 0.100 (from 1/10)", "0%")


def test_a_diverged_search_never_reaches_the_loss() -> None:
    runs = [
        result("fixed", 3e-3, 0, 2.0),
        result("paper", 3e-3, 0, math.inf, curve=((500, 3.0), (1000, math.inf))),
    ]
    table = search_table.search_table(Results(runs), MAIN, "cosine", (1,), 3e-3)
    rows = {row[0]: row[1] for row in table.rows}
    assert rows["paper, mean"] == "+inf"
    assert rows["paper, steps to the fixed rate's loss"] == "never (0 of 1)"


def test_every_experiment_has_a_section() -> None:
    seeds, runs = (10,), []
    grid = plan.grid_runs(MAIN, ("cosine", "WSD"), TINY, seeds)
    grid += plan.grid_runs(plan.CONTINUAL, ("cosine",), TINY, seeds, 3e-3)
    best = BEST | {("code", "WSD"): 3e-3, ("continual", "cosine"): 3e-3}
    for run in [*grid, *plan.runs_after_grid(plan.EXPERIMENTS[:-2], TINY, seeds, best)]:
        valid = 2.0 + abs(math.log10(run.lr / 3e-3))
        ramp = {"scale": 0.02, "discarded_steps": 100} if run.method in plan.RANGE_TESTS else {}
        runs.append(replace(result(run.method, run.lr, run.seed, valid, **ramp), run=run))
    made = report.local_sections(Results(runs), plan.EXPERIMENTS[:-2], TINY)
    titles = [section.table.title for section in made]
    assert titles == [
        "Fixed rates: code, cosine",
        "Fixed rates: code, WSD",
        "Fixed rates: continual, cosine",
        "Searches: code, cosine, 1 seed",
        "What a search costs: code, cosine",
        "Searches: code, WSD, 1 seed",
        "What a search costs: code, WSD",
        "With and without backtracking",
        "Factors",
        "Windows and decay of the factors",
        "Searches: continual, cosine, 1 seed",
        "What a search costs: continual, cosine",
        "Peers: code",
    ]
    assert "backtrack off" in made[7].table.markdown()
    assert "alpha 2, beta 1.67" in made[8].table.markdown()
    assert "700 steps on prose from the weights that 2000 steps on code at the best fixed rate (0.003," in (
        made[10].table.markdown()
    )
    assert (
        "| lr-range-test-tenth | cosine | found: 0.02 | +2.523 [+2.523] | 10.0% |"
        in made[12].table.markdown()
    )
    assert "| schedulefree | constant | 0.003 |" in made[12].table.markdown()
    drawn = [trace.name for trace in made[0].figure.data if trace.name]
    assert drawn == [
        "final validation loss",
        "its optimum: 0.003",
        "velocity in the search window",
        "its optimum: 0.0001",
    ]


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError, match=r"result\.json: not a result of this program"):
        results.load(tmp_path / "result.json")
