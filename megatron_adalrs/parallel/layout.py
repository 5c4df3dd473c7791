"""How a model's work is laid out over ranks and over time: all that its modules know of the mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_adalrs.config import Config
from megatron_adalrs.distributed.process_mesh import ONE_RANK, MeshAxis


@dataclass(frozen=True)
class Layout:
    """Where a model's parts are computed. The default is a whole model in one process."""

    tensor: MeshAxis = ONE_RANK
    """Ranks that share every layer's heads and MLP features, and the vocabulary."""
    context: MeshAxis = ONE_RANK
    """Ranks that share every sequence."""
    sequence_parallel: bool = False
    """Whether what lies between the tensor-parallel regions is split along the sequence over the tensor
    axis."""
    recompute: Literal["full", "selective"] | None = None
    """Which activations the backward pass computes again: those of whole blocks, or of attention's core."""

    @classmethod
    def of(cls, config: Config, tensor: MeshAxis, context: MeshAxis) -> Layout:
        """What a configuration asks for, along these axes."""
        return cls(tensor, context, config.parallel.sequence_parallel, config.training.recompute_granularity)


ONE_PROCESS_LAYOUT = Layout()
