"""Random numbers along an axis: ranks of a tensor group share torch's random stream, and part from it where
they must.

Ranks that hold copies of one activation must drop the same elements of it, ranks that hold different parts
different ones. The streams are seeded alike in a tensor group, so sharing is what happens by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_adalrs.distributed.process_mesh import MeshAxis


@contextmanager
def own_stream(axis: MeshAxis) -> Iterator[None]:
    """Context in which each rank of the axis draws other random numbers, although all come in with the same
    stream.

    The seed inside is drawn from the shared stream: there is no state besides torch's own, which snapshots,
    checkpoints and recomputed activations take care of already.
    """
    if axis.size == 1:
        yield
        return
    seed = int(torch.randint(1 << 62, ()))
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed + axis.rank)
        yield


def dropout(x: Tensor, p: float, training: bool, axis: MeshAxis) -> Tensor:
    """Dropout on an activation of which each rank of the axis holds another part."""
    if not p or not training:
        return x
    with own_stream(axis):
        return F.dropout(x, p)
