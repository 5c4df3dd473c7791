"""The planned memory equals that of real ranks."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_adalrs.planning import plan_run
from megatron_adalrs.planning.tensor_memory import LiveMemory
from tests.helpers.ranks import Ranks
from tests.helpers.runs import VOCABULARY, micro_batches, start

# Activations weigh about as much as the rest.
COMMON = {
    "num_layers": 2,
    "hidden_size": 128,
    "seq_length": 256,
    "micro_batch_size": 2,
    "global_batch_size": 8,
}
GPT2 = COMMON | {"preset": "gpt2-tiny"}
QWEN2 = COMMON | {"preset": "qwen2-tiny", "num_query_groups": 2}
UNTIED = COMMON | {"preset": "llama-tiny", "num_query_groups": 4, "untie_embeddings_and_output_weights": True}
TENSOR, PIPE, CONTEXT = (
    f"{name}_size" for name in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")
)
DOCUMENTS = {
    "reset_attention_mask": True,
    "reset_position_ids": True,
    "eod_mask_loss": True,
    "eod_token_id": 3,
}
TWO_RANKS = [
    *(GPT2 | {"zero_stage": stage} for stage in (0, 1)),
    *(QWEN2 | {"zero_stage": stage, "bf16": True} for stage in (0, 3)),
    QWEN2 | {"zero_stage": 2, "global_batch_size": 4},  # a single micro-batch
    GPT2 | {"hidden_size": 256, "seq_length": 32},  # the optimizer's work is the peak
    UNTIED | {TENSOR: 2, "sequence_parallel": True},
    QWEN2 | {PIPE: 2, "zero_stage": 1, "bf16": True, "recompute_granularity": "full"},
    GPT2 | {CONTEXT: 2, "zero_stage": 3, "recompute_granularity": "selective"},
    GPT2 | {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    # A mask as large as all else that is kept.
    QWEN2 | DOCUMENTS | {"zero_stage": 1, "bf16": True, "seq_length": 512},
    QWEN2 | DOCUMENTS | {PIPE: 2, "seq_length": 512},
]
FOUR_RANKS = [GPT2 | {PIPE: 4, "num_layers": 4}, UNTIED | {TENSOR: 2, CONTEXT: 2}]


def measured(values: dict[str, Any]) -> dict[str, int]:
    """Return parameters and peak memory of a step with optimizer state, and the plan of both."""
    with LiveMemory() as memory:
        config, mesh, engine = start(values)
        for step in range(2):
            memory.reset_peak()
            engine.train_batch(micro_batches(config, mesh, step))
    rank = plan_run(config, VOCABULARY, mesh.shape, on_cpu=True).stages[mesh.pipe.rank]
    return {
        "parameters": engine.parameters_held,
        "planned_parameters": rank.part.parameters,
        "peak": memory.peak,
        "planned_peak": rank.peak,
    }


def assert_as_planned(ranks: Ranks, values: dict[str, Any]) -> None:
    for found in ranks.run(measured, values):
        assert found["planned_parameters"] == found["parameters"]
        assert found["planned_peak"] == pytest.approx(found["peak"], rel=0.1)


def changes(values: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items() if COMMON.get(name) != value)


@pytest.mark.parametrize("values", TWO_RANKS, ids=changes)
def test_two_ranks_match_the_plan(two_ranks: Ranks, values: dict[str, Any]) -> None:
    assert_as_planned(two_ranks, values)


@pytest.mark.parametrize("values", FOUR_RANKS, ids=changes)
def test_four_ranks_match_the_plan(four_ranks: Ranks, values: dict[str, Any]) -> None:
    assert_as_planned(four_ranks, values)
