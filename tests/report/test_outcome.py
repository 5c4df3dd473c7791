from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from megatron_adalrs.metrics.run_log import read_run
from megatron_adalrs.report.drawing import Run
from megatron_adalrs.report.outcome import outcome
from tests.report.conftest import SyntheticRun

MakeRun = Callable[..., Path]


def paragraphs(*paths: Path) -> list[str]:
    runs = [Run(path.name, "#000000", read_run(path)) for path in paths]
    return [outcome(run, runs) for run in runs]


def last_loss(path: Path) -> float:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [float(line["loss"]) for line in lines if line.get("split") == "valid"][-1]


def test_rates_reason_cost_and_result_are_given(make_run: MakeRun) -> None:
    run = make_run("run", reason="slower than twice the error.")
    (text,) = paragraphs(run)

    assert "given learning rate was 1e-4; the search found 4.55e-4 (× 4.55)." in text
    assert "5 trials: 2 accepted, 1 failed, 1 aborted, 1 neutral." in text
    assert "The last trial (failed, step 140): slower than twice the error." in text
    assert "The last decision (search ended, step 140): the search window is over." in text
    assert "discarded 25 of 425 executed steps (5.9%)" in text
    assert f"final validation loss is {last_loss(run):.4f} (step 400)." in text
    assert "not ended" not in text and "not finished" not in text


def test_the_fixed_rate_run_is_compared_in_any_order(make_run: MakeRun) -> None:
    search, fixed = make_run("search"), make_run("fixed", adalrs=False)
    difference = last_loss(fixed) - last_loss(search)
    expected = f"{difference:.4f} lower than the {last_loss(fixed):.4f} of fixed (fixed at 1e-4)."

    assert difference > 0
    for paths in ([search, fixed], [fixed, search]):
        texts = dict(zip([path.name for path in paths], paragraphs(*paths), strict=True))
        assert expected in texts["search"]
        assert "425 executed steps, against 400." in texts["search"]
        assert "given rate of 1e-4" in texts["fixed"] and "lower" not in texts["fixed"]


def test_two_searches_are_not_called_fixed(make_run: MakeRun) -> None:
    assert all("fixed" not in text for text in paragraphs(make_run("a"), make_run("b")))


def test_an_unfinished_search_says_so(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "run", 100, 0)
    run.event("start")
    run.train(10)
    run.decide("trial_started", 3.0, reason="trying 3 x the rate")
    run.train(5, "trial")
    (text,) = paragraphs(run.write({}))

    assert "changed the given learning rate by × 3." in text
    assert "1 trial: 1 running." in text
    assert "The last decision (trial started, step 10): trying 3 x the rate." in text
    assert "The search had not ended." in text
    assert "No validation was recorded; the last training loss is" in text
    assert "The run has not finished: step 15." in text


def test_loss_guard_is_no_search_and_has_its_own_cost(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "run", 40, 0)
    run.event("start")
    run.train(20)
    run.step -= 4
    run.decide("loss_guard_rewound", discarded_steps=4, reason="not finite")
    run.train(20)
    run.event("end")
    (text,) = paragraphs(run.write())

    assert "no decision of a search" in text
    assert "The loss guard discarded 4 of 40 executed steps (10.0%)." in text
