"""A run that is interrupted in its search and resumed has the losses of an uninterrupted one, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.metrics import Record
from megatron_adalrs.metrics.run_log import RunLog, read_run
from megatron_adalrs.training.build import build_trainer
from tests.helpers.ranks import Ranks
from tests.helpers.settings import ONE_LAYER, SHORT_ROBUST_SEARCH, counting_data
from tests.helpers.sinks import Interrupt

STEPS = 60
PAPER = {"mode": "paper", "window": 5, "search_start": 0.25, "search_end": 0.8, "decay_threshold": 9.0}
ROBUST = SHORT_ROBUST_SEARCH
PIPE = {"pipeline_model_parallel_size": 2, "num_layers": 2}
CELLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero0": ({}, PAPER),
    "zero1-bf16": ({"zero_stage": 1, "bf16": True}, ROBUST),
    "zero2": ({"zero_stage": 2}, PAPER),
    "zero3": ({"zero_stage": 3}, ROBUST),
    "pipe": (PIPE, ROBUST),
    "pipe-zero1-bf16": (PIPE | {"zero_stage": 1, "bf16": True}, PAPER),
}


def values(data: Path, run: Path, search: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "preset": "llama-tiny",
        **ONE_LAYER,
        **counting_data(data, split="1,0,0"),
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_iters": STEPS,
        "lr": 1e-3,
        "hidden_dropout": 0.1,
        "run_dir": str(run),
        "adalrs": search,
    } | changes


def trained(config: dict[str, Any], ends_after: int | None = None) -> int:
    """Train and return the exit code.

    Args:
        ends_after: Executed steps after which a signal to the second rank ends the run in its next trial.
    """
    trainer = build_trainer(config_from_values(config))

    def ends_here(record: Record) -> bool:
        is_trial = record["phase"] in ("trial", "restart")
        return ends_after is not None and is_trial and record["total_steps"] >= ends_after

    if trainer.mesh.rank == 1:
        trainer.metrics.add(Interrupt(ends_here))
    return trainer.train()


def kept(run: RunLog) -> list[tuple[int, float, float]]:
    """Return step, loss and learning rate of the kept steps."""
    train = run.train
    return list(
        zip(*(column[train.kept].tolist() for column in (train.step, train.loss, train.lr)), strict=True)
    )


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_search_ended_on_one_rank_resumes_exactly(
    two_ranks: Ranks, data: Path, tmp_path: Path, cell: str
) -> None:
    layout, search = CELLS[cell]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert two_ranks.run(trained, values(data, whole, search, **layout)) == [0, 0]
    assert two_ranks.run(trained, values(data, run, search, **layout), 25) == [143, 143]
    assert read_run(run).events[-1].step < STEPS
    assert two_ranks.run(trained, values(data, run, search, **layout, load=str(run))) == [0, 0]
    assert len(kept(read_run(whole))) == STEPS
    assert kept(read_run(run)) == kept(read_run(whole))
    assert read_run(run).scale == read_run(whole).scale


def test_changed_rate_overrides_the_search(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    layout = {"num_layers": 1, "hidden_dropout": 0.0}
    assert one_rank.run(trained, values(data, run, ROBUST, **layout)) == [0]
    end = read_run(run)
    assert end.scale != 1.0
    longer = layout | {"load": str(run), "train_iters": STEPS + 5, "lr_decay_style": "constant"}
    assert one_rank.run(trained, values(data, run, ROBUST, **longer)) == [0]
    assert kept(read_run(run))[-1][2] == pytest.approx(1e-3 * end.scale)
    override = longer | {"train_iters": STEPS + 10, "lr": 5e-4, "weight_decay": 0.2, "micro_batch_size": 4}
    assert one_rank.run(trained, values(data, run, ROBUST, **override)) == [0]
    assert kept(read_run(run))[-1][2] == 5e-4
    resumed = next(event for event in reversed(read_run(run).events) if event.event == "resume")
    assert resumed.changed == {
        "train_iters": (STEPS + 5, STEPS + 10),
        "lr": (1e-3, 5e-4),
        "lr_decay_iters": (STEPS + 5, STEPS + 10),
        "weight_decay": (0.1, 0.2),
        "micro_batch_size": (2, 4),
    }
