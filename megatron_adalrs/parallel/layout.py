"""Layout of a model over ranks: all that its modules know of the mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_adalrs.config import Config
from megatron_adalrs.distributed.process_mesh import ONE_RANK, MeshAxis


@dataclass(frozen=True)
class Layout:
    """The axes over which a model is split. The default is a whole model in one process."""

    tensor: MeshAxis = ONE_RANK
    """Axis over which the heads and MLP features of every layer and the vocabulary are split."""
    context: MeshAxis = ONE_RANK
    """Axis over which every sequence is split."""
    sequence_parallel: bool = False
    """Whether the tensor ranks split activations between tensor-parallel regions along the sequence."""
    recompute: Literal["full", "selective"] | None = None
    """Activations that the backward pass recomputes: those of whole blocks, or of attention's core."""

    @classmethod
    def of(cls, config: Config, tensor: MeshAxis, context: MeshAxis) -> Layout:
        """Return the configured layout along these axes."""
        return cls(tensor, context, config.parallel.sequence_parallel, config.training.recompute_granularity)


ONE_PROCESS_LAYOUT = Layout()
