"""Random numbers in tensor groups, for dropout.

Ranks that hold copies of an activation must drop the same elements; ranks that hold different parts of it
must draw different numbers. All ranks of a tensor group are seeded alike, so they draw the same numbers
except within `rank_local_rng`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_adalrs.distributed.process_mesh import MeshAxis


@contextmanager
def rank_local_rng(axis: MeshAxis) -> Iterator[None]:
    """Return a context in which the ranks of an axis draw different random numbers.

    The seed within the context is drawn from the shared generator. There is no random state besides torch's
    own, which snapshots, checkpoints and activation checkpointing handle already.
    """
    if axis.size == 1:
        yield
        return
    seed = int(torch.randint(1 << 62, ()))
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed + axis.rank)
        yield


def dropout(x: Tensor, p: float, training: bool, axis: MeshAxis) -> Tensor:
    """Apply dropout to an activation of which each rank of the axis holds a different part."""
    if not p or not training:
        return x
    with rank_local_rng(axis):
        return F.dropout(x, p)
