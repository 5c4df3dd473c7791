"""With one seed, losses and gradient norms depend neither on the mesh nor on the ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.runs import micro_batches, start

STEPS = 20
# At this rate rounding errors do not grow; at 1e-2 they double every few steps.
COMMON = {"num_layers": 2, "lr": 2e-3, "micro_batch_size": 4, "global_batch_size": 16, "clip_grad": 1.1}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": COMMON | {"preset": "gpt2-tiny"},
    "qwen2": COMMON | {"preset": "qwen2-tiny", "num_query_groups": 2},
    "untied": COMMON
    | {
        "preset": "llama-tiny",
        "num_query_groups": 4,
        "untie_embeddings_and_output_weights": True,
        "use_rope_scaling": True,
        "rope_scaling_original_max_position_embeddings": 8,
    },
    "deep": COMMON | {"preset": "gpt2-tiny", "num_layers": 4},
}
TENSOR, PIPE, CONTEXT = (
    f"{name}_size" for name in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")
)
TWO_RANKS = [
    *(("gpt2", {"zero_stage": stage}) for stage in range(4)),
    ("untied", {"zero_stage": 3}),
    ("qwen2", {TENSOR: 2}),
    ("gpt2", {TENSOR: 2, "sequence_parallel": True}),
    ("untied", {TENSOR: 2, "zero_stage": 3}),
    ("gpt2", {PIPE: 2}),
    ("gpt2", {PIPE: 2, "zero_stage": 1}),
    ("untied", {PIPE: 2, "zero_stage": 1, "pipeline_partition": "uniform"}),
    ("gpt2", {CONTEXT: 2}),
    ("untied", {CONTEXT: 2, "zero_stage": 3}),
    # Activation checkpointing does not change results.
    ("gpt2", {"recompute_granularity": "full"}),
    ("qwen2", {"recompute_granularity": "selective", "zero_stage": 3}),
    ("gpt2", {"recompute_granularity": "full", PIPE: 2}),
    ("qwen2", {"recompute_granularity": "full", TENSOR: 2, "sequence_parallel": True}),
]
FOUR_RANKS = [
    # With 50 tokens padded to 512, three of the ranks hold nothing but padding.
    ("gpt2", {TENSOR: 4, "micro_batch_size": 8}),
    ("deep", {PIPE: 4, "pipeline_partition": "uniform"}),
    ("qwen2", {PIPE: 2}),
    ("qwen2", {TENSOR: 2, "sequence_parallel": True, "zero_stage": 1}),
    ("untied", {TENSOR: 2, CONTEXT: 2, "sequence_parallel": True, "zero_stage": 1}),
    ("qwen2", {CONTEXT: 4}),  # two key-value heads for four ranks
]
EIGHT_RANKS = [
    ("gpt2", {PIPE: 2, TENSOR: 2}),
    (
        "untied",
        {PIPE: 2, TENSOR: 2, "sequence_parallel": True, "zero_stage": 1, "recompute_granularity": "full"},
    ),
]


def train(values: dict[str, Any]) -> dict[str, list[float]]:
    """Return losses and gradient norms of training with evaluations, one of them with ragged batches."""
    config, mesh, engine = start(values)
    full = config.micro_batches_per_step(mesh.data.size)
    results, evaluations = [], []

    def evaluate(*sizes: int) -> None:
        batches = [micro_batches(config, mesh, 1000 + index)[:size] for index, size in enumerate(sizes)]
        evaluations.append(engine.evaluate(iter(batches)))

    for step in range(STEPS):
        results.append(engine.train_batch(micro_batches(config, mesh, step)))
        if step == STEPS // 2:
            evaluate(full, full)
    evaluate(full, full // 2)
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "evaluations": evaluations,
    }


@pytest.fixture(scope="module")
def of_one_rank(one_rank: Ranks) -> dict[str, dict[str, list[float]]]:
    results = {name: one_rank.run(train, values)[0] for name, values in SHAPES.items()}
    for result in results.values():
        assert result["losses"][-1] < result["losses"][0] - 0.5, "nothing was learnt"
        assert min(result["norms"]) < COMMON["clip_grad"] < max(result["norms"]), "clipping was not tried"
    return results


def assert_like_one_rank(ranks: Ranks, of_one_rank: dict[str, Any], shape: str, mesh: dict[str, Any]) -> None:
    found = ranks.run(train, SHAPES[shape] | mesh)
    assert all(result == found[0] for result in found), "ranks disagree"
    for name, expected in of_one_rank[shape].items():
        assert found[0][name] == pytest.approx(expected, rel=1e-5), name


def name_of(value: Any) -> str:
    if isinstance(value, str):
        return value
    return ",".join(f"{key.removesuffix('_model_parallel_size')}={size}" for key, size in value.items())


@pytest.mark.parametrize(("shape", "mesh"), TWO_RANKS, ids=name_of)
def test_two_ranks_train_like_one(
    two_ranks: Ranks, of_one_rank: dict[str, Any], shape: str, mesh: dict
) -> None:
    assert_like_one_rank(two_ranks, of_one_rank, shape, mesh)


@pytest.mark.parametrize(("shape", "mesh"), FOUR_RANKS, ids=name_of)
def test_four_ranks_train_like_one(
    four_ranks: Ranks, of_one_rank: dict[str, Any], shape: str, mesh: dict
) -> None:
    assert_like_one_rank(four_ranks, of_one_rank, shape, mesh)


@pytest.mark.parametrize(("shape", "mesh"), EIGHT_RANKS, ids=name_of)
def test_eight_ranks_train_like_one(
    eight_ranks: Ranks, of_one_rank: dict[str, Any], shape: str, mesh: dict
) -> None:
    assert_like_one_rank(eight_ranks, of_one_rank, shape, mesh)
