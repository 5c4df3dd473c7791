"""Grid of processes, and what it asks of the model and of ZeRO."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from megatron_adalrs.config.base import Group, require, shown_division
from megatron_adalrs.config.model import ModelConfig
from megatron_adalrs.config.training import TrainingConfig


class ParallelConfig(Group):
    """Grid of processes: what these leave over of the world is data-parallel."""

    pipeline_model_parallel_size: PositiveInt = 1
    """Stages that the layers are cut into, one rank after the other holding a part of the model."""
    pipeline_partition: Literal["parameters", "uniform"] = "parameters"
    """Stages of about as many parameters each, or of as many layers (embedding, norm and output count as one each)."""
    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share every layer's heads and MLP features, and the vocabulary."""
    sequence_parallel: bool = False
    """Split what lies between the tensor-parallel regions (norms, dropout, residual) along the sequence."""


def require_possible_grid(parallel: ParallelConfig, model: ModelConfig, training: TrainingConfig) -> None:
    """Whether the grid can hold the model, whatever the size of the world.

    Raises:
        ValueError: with the arithmetic, naming what to change.
    """
    if parallel.pipeline_model_parallel_size > 1:
        tensor = parallel.tensor_model_parallel_size
        require(
            tensor == 1,
            f"tensor_model_parallel_size: {tensor} does not combine with pipeline_model_parallel_size "
            f"{parallel.pipeline_model_parallel_size} yet: leave one of them at 1",
        )
        _require_possible_pipeline(parallel.pipeline_model_parallel_size, model, training)
    _require_tensor_ranks_that_divide(parallel, model)


def _require_possible_pipeline(stages: int, model: ModelConfig, training: TrainingConfig) -> None:
    zero_stage = training.zero_stage
    require(
        model.num_layers >= stages,
        f"pipeline_model_parallel_size: {stages} stages need a block each, num_layers is {model.num_layers}",
    )
    require(
        zero_stage <= 1,
        f"zero_stage: {zero_stage} shards gradients, which a pipeline accumulates over its micro-batches; "
        f"with pipeline_model_parallel_size {stages} use --zero-stage 0 or 1",
    )
    require(
        zero_stage == 1 or not training.bf16,
        f"zero_stage: {zero_stage} with bf16 and pipeline_model_parallel_size {stages} makes checkpoints that "
        "DeepSpeed cannot load; use --zero-stage 1",
    )


def _require_tensor_ranks_that_divide(parallel: ParallelConfig, model: ModelConfig) -> None:
    ranks = parallel.tensor_model_parallel_size
    shared = {
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_key_value_heads,
        "ffn_hidden_size": model.mlp_size,
    }
    if parallel.sequence_parallel:
        require(
            ranks > 1,
            "sequence_parallel: splits the sequence over the tensor ranks, and tensor_model_parallel_size is 1; "
            "raise it, or leave sequence_parallel out",
        )
        shared["seq_length"] = model.seq_length
    for name, size in shared.items():
        require(
            size % ranks == 0,
            f"{name}: {size} is not divisible by tensor_model_parallel_size: {shown_division(size, ranks)}; "
            "each tensor rank takes an equal part",
        )
