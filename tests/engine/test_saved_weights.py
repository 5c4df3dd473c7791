"""Weights saved on one mesh, loaded on another mesh, ZeRO stage and precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.engine import Engine, SavedWeights, build_engine
from tests.helpers import runs
from tests.helpers.ranks import Ranks
from tests.helpers.settings import TINY_QWEN2

PIPE, TENSOR, CONTEXT = "pipeline_model_parallel_size", "tensor_model_parallel_size", "context_parallel_size"
MODEL = TINY_QWEN2
SAVED = {
    "zero1": {"zero_stage": 1},
    "zero3": {"zero_stage": 3},
    "zero3 bf16": {"zero_stage": 3, "bf16": True},
    "tensor": {TENSOR: 2, "sequence_parallel": True},
    "pipe": {PIPE: 2},
}
SAVED_BY_FOUR = {
    "tensor x zero3": {TENSOR: 2, "zero_stage": 3},
    "tensor x pipe": {TENSOR: 2, PIPE: 2, "bf16": True, "zero_stage": 1},
}
READ = [
    ("tensor", {"zero_stage": 3}),
    ("zero3", {TENSOR: 2}),
    ("zero1", {PIPE: 2}),
    ("tensor x zero3", {PIPE: 2, "zero_stage": 1, "bf16": True}),
    ("tensor x pipe", {"zero_stage": 1, "bf16": True}),
    ("pipe", {CONTEXT: 2, "zero_stage": 2}),
]


def loss_of(engine: Engine, config: Any, mesh: Any) -> float:
    return engine.evaluate(iter([runs.micro_batches(config, mesh, 77)]))


def save(values: dict[str, Any], folder: str) -> float:
    """Run two steps, save the weights and return their loss."""
    config, mesh, engine = runs.start(MODEL | values)
    for step in range(2):
        engine.train_batch(runs.micro_batches(config, mesh, step))
    engine.save(Path(folder))
    return loss_of(engine, config, mesh)


def read(values: dict[str, Any], saved: dict[str, Any], folder: str) -> tuple[float, float]:
    """Return the loss of the weights in a folder, before and after they are recomputed from the masters."""
    config = runs.tiny_config(**MODEL | values | {"make_vocab_size_divisible_by": 8, "seed": 5})
    mesh = runs.mesh_of(config)
    theirs = runs.tiny_config(**MODEL | saved)
    axes = saved.get(PIPE, 1), saved.get(TENSOR, 1)
    weights = SavedWeights(Path(folder), theirs.model, runs.VOCABULARY, theirs.training.zero_stage, *axes)
    engine = build_engine(config, runs.VOCABULARY, mesh, weights)
    loss = loss_of(engine, config, mesh)
    engine.sync_weights_from_masters()
    return loss, loss_of(engine, config, mesh)


@pytest.fixture(scope="module")
def saved(two_ranks: Ranks, four_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return folder and loss by name."""
    folder, found = tmp_path_factory.mktemp("saved"), {}
    for ranks, cases in ((two_ranks, SAVED), (four_ranks, SAVED_BY_FOUR)):
        for name, values in cases.items():
            place = str(folder / name / "engine")
            found[name] = values, place, ranks.run(save, values, place)[0]
    assert len({loss for *_, loss in found.values()}) > 1
    return found


def assert_same(ranks: Ranks, saved: tuple[dict[str, Any], str, float], values: dict[str, Any]) -> None:
    theirs, folder, loss = saved
    tolerance = 2e-3 if values.get("bf16") or theirs.get("bf16") else 1e-6
    for found in ranks.run(read, values, theirs, folder):
        assert found[0] == pytest.approx(loss, rel=tolerance)
        assert found[1] == found[0], "the masters are not of these weights"


@pytest.mark.parametrize("name", [*SAVED, *SAVED_BY_FOUR])
def test_one_rank_has_the_loss_of_the_ranks_that_saved(
    one_rank: Ranks, saved: dict[str, Any], name: str
) -> None:
    assert_same(one_rank, saved[name], {})


@pytest.mark.parametrize(("name", "mesh"), READ)
def test_two_ranks_of_another_kind_have_that_loss(
    two_ranks: Ranks, saved: dict[str, Any], name: str, mesh: dict[str, Any]
) -> None:
    assert_same(two_ranks, saved[name], mesh)
