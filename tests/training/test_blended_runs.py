"""Training on blends: equal on any mesh, exact after trials and resumes, with a curve for each corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.data.indexed_dataset_builder import IndexedDatasetBuilder
from megatron_adalrs.metrics.run_log import RunLog, read_run
from megatron_adalrs.training.build import build_trainer
from tests.helpers.ranks import Ranks
from tests.helpers.runs import refusal
from tests.helpers.settings import ONE_LAYER, SHORT_ROBUST_SEARCH
from tests.helpers.sinks import Interrupt

STEPS = 60
LOST = SHORT_ROBUST_SEARCH | {"confidence": 1e9, "min_scale": 1.0}
"""Search whose races are all lost, so that all steps of its trials are undone."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create three corpora that count by 1, 2 and 3 from random starts, modulo 50."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for step, name in enumerate(("ones", "twos", "threes"), start=1):
        with IndexedDatasetBuilder(folder / name, np.uint16) as builder:
            for _ in range(20):
                builder.add_document((random.integers(0, 50) + step * np.arange(100 + step)) % 50)
            builder.finalize()
    return folder


def values(data: Path, run: Path, **changes: Any) -> dict[str, Any]:
    return {
        "preset": "llama-tiny",
        **ONE_LAYER,
        "vocab_size": 50,
        "micro_batch_size": 1,
        "global_batch_size": 4,
        "train_iters": STEPS,
        "lr": 1e-2,
        "train_data_path": [3, f"{data}/ones", 1, f"even={data}/twos"],
        "eval_iters": 2,
        "eval_interval": 20,
        "valid_data_path": [3, f"{data}/ones", 1, f"{data}/threes"],
        "run_dir": str(run),
        "log_interval": 1,
    } | changes


def trained(config: dict[str, Any], ends_in_a_trial: bool = False) -> int:
    """Train and return the exit code; where asked, a signal ends the run in a trial."""
    trainer = build_trainer(config_from_values(config))
    if ends_in_a_trial:
        trainer.metrics.add(Interrupt(lambda record: record["phase"] == "trial" and record["step"] % 5 == 3))
    return trainer.train()


def kept(run: RunLog) -> list[float]:
    return run.train.loss[run.train.kept].tolist()


def consumed(run: RunLog) -> dict[str, tuple[int, int, float]]:
    return {use.name: (use.samples, use.tokens, use.epochs) for use in run.corpora.corpora}


def test_one_and_two_ranks_see_the_same_blend(
    one_rank: Ranks, two_ranks: Ranks, data: Path, tmp_path: Path
) -> None:
    assert one_rank.run(trained, values(data, tmp_path / "one")) == [0]
    assert two_ranks.run(trained, values(data, tmp_path / "two")) == [0, 0]
    one, two = read_run(tmp_path / "one"), read_run(tmp_path / "two")
    assert kept(two) == pytest.approx(kept(one), abs=1e-5)
    assert consumed(one) == consumed(two) == {"ones": (180, 2880, 2880 / 2020), "even": (60, 960, 960 / 2040)}

    splits = [evaluation.split for evaluation in one.evaluations]
    assert splits == ["valid/ones", "valid/threes", "valid"] * 3
    for first in (0, 3):
        ones, threes, mean = (evaluation.loss for evaluation in one.evaluations[first : first + 3])
        assert mean == pytest.approx(0.75 * ones + 0.25 * threes)
        assert threes > ones  # which is what was trained on
    board = EventAccumulator(str(tmp_path / "one" / "tensorboard")).Reload()
    assert [point.step for point in board.Scalars("valid/threes/loss")] == [20, 40, 60]
    assert [point.value for point in board.Scalars("corpora/even/tokens")] == [320, 640, 960]


def test_search_and_resume_do_not_change_consumption(two_ranks: Ranks, data: Path, tmp_path: Path) -> None:
    search = {"adalrs": LOST, "zero_stage": 1}
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert two_ranks.run(trained, values(data, whole, **search)) == [0, 0]
    assert two_ranks.run(trained, values(data, run, **search), True) == [143, 143]
    stopped = read_run(run)
    assert stopped.events[-1].step < STEPS
    assert two_ranks.run(trained, values(data, run, load=str(run), **search)) == [0, 0]
    assert kept(read_run(run)) == kept(read_run(whole))
    assert read_run(whole).totals.discarded_steps > 0
    assert consumed(read_run(run)) == consumed(read_run(whole))
    assert consumed(read_run(run))["ones"][0] == 3 * STEPS
    resumed = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"corpora"' in line]
    assert any(f'"step": {stopped.events[-1].step},' in line for line in resumed)

    other = [1, f"{data}/ones", 1, f"even={data}/twos"]
    (message, _) = two_ranks.run(refusal, values(data, run, load=str(run), train_data_path=other, **search))
    assert "was trained on a blend of 3/4 ones, 1/4 even, this run has 1/2 ones, 1/2 even" in message
    other = [3, f"{data}/ones", 1, f"even={data}/threes"]
    (message, _) = two_ranks.run(refusal, values(data, run, load=str(run), train_data_path=other, **search))
    assert "was trained with data order" in message
