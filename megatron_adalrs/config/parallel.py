"""ProcessMesh of processes, and what it asks of the model and of ZeRO."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from megatron_adalrs.config.base import Group, require, shown_division
from megatron_adalrs.config.model import ModelConfig
from megatron_adalrs.config.training import TrainingConfig


class ParallelConfig(Group):
    """ProcessMesh of processes: what these leave over of the world is data-parallel."""

    pipeline_model_parallel_size: PositiveInt = 1
    """Stages that the layers are cut into, one rank after the other holding a part of the model."""
    pipeline_partition: Literal["parameters", "uniform"] = "parameters"
    """Stages of about as many parameters each, or of as many layers (embedding, norm and output count as one
    each)."""
    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share every layer's heads and MLP features, and the vocabulary."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share every sequence (DeepSpeed-Ulysses): each holds a part of it, and in attention of the
    heads."""
    sequence_parallel: bool = False
    """Split what lies between the tensor-parallel regions (norms, dropout, residual) along the sequence."""

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes that share out the model, by the names that `MeshShape.of_world` gives them."""
        return {
            "pipe": self.pipeline_model_parallel_size,
            "context": self.context_parallel_size,
            "tensor": self.tensor_model_parallel_size,
        }


def require_possible_mesh(parallel: ParallelConfig, model: ModelConfig, training: TrainingConfig) -> None:
    """Whether the mesh can hold the model, whatever the size of the world.

    Raises:
        ValueError: with the arithmetic, naming what to change.
    """
    if parallel.pipeline_model_parallel_size > 1:
        _require_possible_pipeline(parallel, model, training)
    if parallel.sequence_parallel:
        require(
            parallel.tensor_model_parallel_size > 1,
            "sequence_parallel: splits the sequence over the tensor ranks, and tensor_model_parallel_size is "
            "1; "
            "raise it, or leave sequence_parallel out",
        )
    _require_equal_parts(parallel, model)


def _require_possible_pipeline(
    parallel: ParallelConfig, model: ModelConfig, training: TrainingConfig
) -> None:
    stages, zero_stage = parallel.pipeline_model_parallel_size, training.zero_stage
    require(
        model.num_layers >= stages,
        f"pipeline_model_parallel_size: {stages} stages need a block each, num_layers is {model.num_layers}",
    )
    require(
        parallel.context_parallel_size == 1,
        f"context_parallel_size: {parallel.context_parallel_size} does not combine with "
        f"pipeline_model_parallel_size "
        f"{stages}: DeepSpeed's pipeline has no context axis; use ZeRO or tensor parallelism in place of the "
        f"pipeline, "
        "or leave context_parallel_size at 1",
    )
    require(
        zero_stage <= 1,
        f"zero_stage: {zero_stage} shards gradients, which a pipeline accumulates over its micro-batches; "
        f"with pipeline_model_parallel_size {stages} use --zero-stage 0 or 1",
    )
    require(
        zero_stage == 1 or training.precision == "fp32",
        f"zero_stage: {zero_stage} with {training.precision} and pipeline_model_parallel_size {stages} makes "
        "checkpoints that DeepSpeed cannot load; use --zero-stage 1",
    )


def _require_equal_parts(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Each rank takes an equal part of what its axis shares out."""
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    by_tensor = ("tensor_model_parallel_size", tensor)
    by_context = ("context_parallel_size", context)
    by_both = ("tensor_model_parallel_size x context_parallel_size", tensor * context)
    shared = [
        ("num_attention_heads", model.num_attention_heads, by_tensor),
        ("num_query_groups", model.num_key_value_heads, by_tensor),
        ("ffn_hidden_size", model.mlp_size, by_tensor),
        ("num_attention_heads", model.num_attention_heads, by_both),
        ("seq_length", model.seq_length, by_context),
    ]
    if parallel.sequence_parallel:
        shared.append(("seq_length", model.seq_length, by_both if context > 1 else by_tensor))
    for name, size, (sizes, ranks) in shared:
        require(
            size % ranks == 0,
            f"{name}: {size} is not divisible by {sizes}: {shown_division(size, ranks)}; each rank takes an "
            f"equal part",
        )
