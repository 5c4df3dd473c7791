"""A resumed run trains with its own weight decay, betas, epsilon and clipping, not with the saved ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.runs import micro_batches, start

CHANGES = {"weight_decay": 30.0, "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_eps": 1.0, "clip_grad": 1e-3}
PIPE = {"pipeline_model_parallel_size": 2}
ENGINES: dict[str, dict[str, Any]] = {
    "zero0": {},
    "zero0-bf16": {"bf16": True},
    "zero1-bf16": {"zero_stage": 1, "bf16": True},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "pipe": PIPE,
    "pipe-zero1-bf16": PIPE | {"zero_stage": 1, "bf16": True},
}


def losses_after_resuming(values: dict[str, Any], folder: Path) -> dict[str, list[float]]:
    """Return the losses of two steps after a checkpoint, unchanged and with each of the changes."""
    config, mesh, engine = start(values)
    engine.train_batch(micro_batches(config, mesh, 0))
    engine.save(folder / "engine")
    engine.files.finish()
    found = {}
    for name in ("unchanged", *CHANGES):
        _, _, resumed = start(values | {name: CHANGES[name]} if name in CHANGES else values)
        resumed.load(folder / "engine")
        resumed.set_lr(config.optimizer.lr)
        found[name] = [resumed.train_batch(micro_batches(config, mesh, step)).loss for step in (1, 2)]
    return found


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_changed_settings_change_the_update(two_ranks: Ranks, tmp_path: Path, engine: str) -> None:
    for losses in two_ranks.run(losses_after_resuming, ENGINES[engine], tmp_path):
        unchanged = losses.pop("unchanged")
        for name, changed in losses.items():
            assert changed[0] == unchanged[0], name  # the state is the saved one
            assert changed[1] != unchanged[1], name


def weight_decays(values: dict[str, Any], folder: Path) -> list[float]:
    _, _, engine = start(values | {"weight_decay": 0.1})
    engine.save(folder / "engine")
    engine.files.finish()
    _, _, resumed = start(values | {"weight_decay": 0.2})
    resumed.load(folder / "engine")
    return [group["weight_decay"] for group in resumed._base_optimizer.param_groups]


def test_biases_and_norms_still_do_not_decay(one_rank: Ranks, tmp_path: Path) -> None:
    assert one_rank.run(weight_decays, {"zero_stage": 2}, tmp_path) == [[0.2, 0.0]]
