"""Length, batch, precision and sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from megatron_adalrs.config.base import Group, require


class TrainingConfig(Group):
    """Length, batch, precision and sharding."""

    train_iters: PositiveInt
    """Optimizer steps to keep; steps of undone AdaLRS trials come on top."""
    micro_batch_size: PositiveInt = 1
    """Samples in one forward pass of one rank."""
    global_batch_size: PositiveInt | None = None
    """Samples in one optimizer step. Default: micro_batch_size x data-parallel ranks."""
    bf16: bool = False
    """Weights and activations in bfloat16, optimizer in fp32. Without bf16 and fp16 everything is fp32."""
    fp16: bool = False
    """Weights and activations in float16, optimizer in fp32, with dynamic loss scaling. GPUs only."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO: 1 shards the optimizer over data-parallel ranks, 2 gradients too, 3 weights too."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Compute activations again in the backward pass instead of keeping them: of whole blocks (full), or of
    attention between its projections (selective: rotary positions, repeated key-value heads, scores and
    probabilities)."""
    deepspeed_config: Path | None = None
    """JSON file with further DeepSpeed settings; a key that contradicts a flag is an error."""
    seed: NonNegativeInt = 1234
    """Seed of the weights, the data order and dropout."""

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """Of weights and activations; the optimizer's is fp32."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @model_validator(mode="after")
    def _one_precision(self) -> TrainingConfig:
        require(not (self.bf16 and self.fp16), "fp16: True contradicts bf16: True; choose one")
        return self
