"""Configuration of the process mesh, and its requirements on the model and on ZeRO."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from megatron_adalrs.config.base import Group, require, shown_division
from megatron_adalrs.config.model import ModelConfig
from megatron_adalrs.config.training import TrainingConfig


class ParallelConfig(Group):
    """Sizes of the parallel axes. The remaining factor of the world size is data-parallel."""

    pipeline_model_parallel_size: PositiveInt = 1
    """Number of pipeline stages that the layers are divided into."""
    pipeline_partition: Literal["parameters", "uniform"] = "parameters"
    """Balance the stages by their numbers of parameters, or by their numbers of layers, where embedding,
    final norm and output count as one layer each."""
    tensor_model_parallel_size: PositiveInt = 1
    """Number of ranks that share the heads and MLP features of every layer, and the vocabulary."""
    context_parallel_size: PositiveInt = 1
    """Number of ranks that share every sequence (DeepSpeed-Ulysses). Each has a part of the sequence and, in
    attention, of the heads."""
    sequence_parallel: bool = False
    """Split the activations between tensor-parallel regions (norms, dropout, residual) along the sequence."""

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the model-parallel axes by the names that `MeshShape.of_world` uses."""
        return {
            "pipe": self.pipeline_model_parallel_size,
            "context": self.context_parallel_size,
            "tensor": self.tensor_model_parallel_size,
        }


def require_possible_mesh(parallel: ParallelConfig, model: ModelConfig, training: TrainingConfig) -> None:
    """Check that the model can be divided over the mesh, for any world size.

    Raises:
        ValueError: If it cannot. The message shows the arithmetic and what to change.
    """
    if parallel.pipeline_model_parallel_size > 1:
        _require_possible_pipeline(parallel, model, training)
    if parallel.sequence_parallel:
        require(
            parallel.tensor_model_parallel_size > 1,
            "sequence_parallel: splits the sequence over the tensor ranks, and tensor_model_parallel_size is "
            "1; increase it, or omit sequence_parallel",
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
        f"context_parallel_size: {parallel.context_parallel_size} cannot be combined with "
        f"pipeline_model_parallel_size {stages}: DeepSpeed's pipeline has no context axis; use ZeRO or "
        "tensor parallelism instead of the pipeline, or leave context_parallel_size at 1",
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
    """Check that every divided size is a multiple of the number of ranks that share it."""
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
            "equal part",
        )
