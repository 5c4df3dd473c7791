"""`--check-ranks-every` names the state in which ranks differ, on all ranks; a sound run passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine import Engine
from megatron_adalrs.training.consistency_check import RanksDiffer, check_ranks
from tests.helpers.ranks import Ranks
from tests.helpers.runs import micro_batches, start

TENSOR, PIPE, CONTEXT = (
    f"{name}_size" for name in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")
)
STATE = {"step": 3, "consumed_samples": 24, "scale": 3.0, "controller.previous": [0.1, float("inf")]}


def outcome(engine: Engine, mesh: ProcessMesh, state: dict[str, Any]) -> str:
    try:
        check_ranks(engine, mesh, state)
    except RanksDiffer as error:
        return str(error)
    return "healthy"


def after_training(values: dict[str, Any]) -> str:
    config, mesh, engine = start(values)
    for step in range(3):
        engine.train_batch(micro_batches(config, mesh, step))
    return outcome(engine, mesh, STATE)


@pytest.mark.parametrize(
    "values",
    [
        *({"zero_stage": stage} for stage in range(4)),
        {"zero_stage": 1, "bf16": True},
        {TENSOR: 2, "sequence_parallel": True},
        {TENSOR: 2, "zero_stage": 3},
        {PIPE: 2},
        {CONTEXT: 2},
    ],
    ids=str,
)
def test_healthy_ranks_pass(two_ranks: Ranks, values: dict[str, Any]) -> None:
    assert two_ranks.run(after_training, values) == ["healthy"] * 2


def with_another_parameter(values: dict[str, Any], rank: int, name: str) -> str:
    """Return the message after one element of a parameter has changed by one bit on one rank."""
    config, mesh, engine = start(values)
    engine.train_batch(micro_batches(config, mesh, 0))
    if mesh.rank == rank:
        element = engine.named_weights()[name].data.view(-1)[-1]
        element.copy_(torch.nextafter(element, torch.tensor(torch.inf)))
    return outcome(engine, mesh, STATE)


@pytest.mark.parametrize(
    ("values", "rank", "name", "sides"),
    [
        ({}, 1, "blocks.1.mlp.output.weight", ("rank 0: ", "rank 1: ")),
        ({"zero_stage": 3}, 0, "final_norm.weight", ("rank 0: ", "rank 1: ")),
        ({TENSOR: 2}, 1, "blocks.0.attention.output.bias", ("rank 0: ", "rank 1: ")),
        ({PIPE: 2}, 1, "embedding.tokens.weight", ("rank 0: ", "rank 1: ")),
    ],
    ids=["data", "zero3", "tensor", "tied"],
)
def test_a_changed_bit_is_found_by_name(
    two_ranks: Ranks, values: dict[str, Any], rank: int, name: str, sides: tuple[str, ...]
) -> None:
    messages = two_ranks.run(with_another_parameter, values, rank, name)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"ranks differ in parameter {name} (")
    assert all(side in messages[0] for side in sides)
    assert ";" not in messages[0], "something else was found"


def test_the_majority_is_listed_first_per_shard(four_ranks: Ranks) -> None:
    name = "blocks.0.mlp.input.weight"
    (message, *others) = four_ranks.run(with_another_parameter, {}, 2, name)
    assert others == [message] * 3
    assert (
        message.startswith(f"ranks differ in parameter {name} (ranks 0, 1, 3: ") and ", rank 2: " in message
    )
    (message, *_) = four_ranks.run(with_another_parameter, {TENSOR: 2}, 3, name)
    assert (
        message.startswith(f"ranks differ in parameter {name} (shard 1) (rank 1: ")
        and ", rank 3: " in message
    )


def with_other_state(changes: dict[str, Any]) -> str:
    _, mesh, engine = start({})
    return outcome(engine, mesh, STATE | (changes if mesh.is_first else {}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 1.5}, "scale (rank 0: 1.5, rank 1: 3.0)"),
        ({"consumed_samples": 16}, "consumed_samples (rank 0: 16, rank 1: 24)"),
        (
            {"step": 2, "controller.previous": None},
            "step (rank 0: 2, rank 1: 3); controller.previous (rank 0: null, rank 1: [0.1, Infinity])",
        ),
    ],
    ids=str,
)
def test_other_state_is_found_by_field(two_ranks: Ranks, changes: dict[str, Any], message: str) -> None:
    assert two_ranks.run(with_other_state, changes) == [f"ranks differ in {message}"] * 2
