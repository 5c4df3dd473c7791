"""Configuration of length, batch sizes, precision and sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from megatron_adalrs.config.base import Group, require

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class TrainingConfig(Group):
    """Length, batch sizes, precision and sharding."""

    train_iters: PositiveInt
    """Number of optimizer steps, not counting steps of undone AdaLRS trials."""
    micro_batch_size: PositiveInt = 1
    """Samples per forward pass of a rank."""
    global_batch_size: PositiveInt | None = None
    """Samples per optimizer step. Default: micro_batch_size * data-parallel ranks."""
    bf16: bool = False
    """Weights and activations in bfloat16, optimizer in fp32. Without bf16 or fp16, everything is in fp32."""
    fp16: bool = False
    """Weights and activations in float16, optimizer in fp32, with dynamic loss scaling; on GPUs only."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage: 1 shards the optimizer states over data-parallel ranks, 2 also the gradients, 3 also the
    weights."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass instead of storing them: those of whole blocks (full), or
    those of attention between its projections (selective)."""
    deepspeed_config: Path | None = None
    """JSON file with additional DeepSpeed settings. A key that contradicts a flag is an error."""
    seed: Seed = 1234
    """Seed of the weights, the data order and dropout, from 0 to 2^63 - 1."""

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """Precision of weights and activations; that of the optimizer is fp32."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @model_validator(mode="after")
    def _one_precision(self) -> TrainingConfig:
        require(not (self.bf16 and self.fp16), "fp16: True contradicts bf16: True; choose one")
        return self
