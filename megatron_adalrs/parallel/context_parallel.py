"""Context parallelism: each rank of the context axis holds a part of every sequence.

Attention needs whole sequences, so ranks exchange their part of the sequence for a part of the heads. Source:
DeepSpeed-Ulysses (arXiv 2309.14509, section 3.1).

Shapes: c = ranks of the axis, b = micro batch, s = sequence, n = query heads, g = key-value heads, d = head
size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_adalrs.distributed.process_mesh import MeshAxis
from megatron_adalrs.parallel.mappings import all_to_all


def split_sequence(x: Tensor, axis: MeshAxis) -> Tensor:
    """Return this rank's part [b, s / c] of tokens [b, s]. Not differentiable.

    Raises:
        ValueError: the sequence is not divisible by the size of the axis.
    """
    if x.shape[1] % axis.size:
        raise ValueError(
            f"a sequence of {x.shape[1]} tokens is not divisible by {axis.size} context-parallel ranks"
        )
    return x.chunk(axis.size, dim=1)[axis.rank]


def sequence_to_heads(q: Tensor, k: Tensor, v: Tensor, axis: MeshAxis) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange a part of the sequence with all heads for the sequence with a part of the heads.

    All three tensors are exchanged in one all-to-all.

    Args:
        q: [b, n, s / c, d]; n is divisible by c.
        k: [b, g, s / c, d]; repeated to n heads first if g is not divisible by c.
        v: as k.
        axis: the context axis.

    Returns:
        q [b, n / c, s, d], and k and v, each [b, g / c, s, d] or [b, n / c, s, d].
    """
    if axis.size == 1:
        return q, k, v
    if k.shape[1] % axis.size:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    parts = [_split_dim(t, 1, axis.size) for t in (q, k, v)]  # each [b, c, heads / c, s / c, d]
    mixed = all_to_all(torch.cat(parts, dim=2).transpose(0, 1), axis)  # [c, b, all heads / c, s / c, d]
    whole = mixed.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [b, all heads / c, s, d]
    q, k, v = torch.split(whole, [part.shape[2] for part in parts], dim=1)
    return q, k, v


def heads_to_sequence(y: Tensor, axis: MeshAxis) -> Tensor:
    """Reverse `sequence_to_heads` for attention's result: [b, n / c, s, d] -> [b, n, s / c, d]."""
    if axis.size == 1:
        return y
    parts = _split_dim(y, 2, axis.size).movedim(2, 0)  # [c, b, n / c, s / c, d]
    return all_to_all(parts, axis).movedim(0, 1).flatten(1, 2)


def _split_dim(x: Tensor, dim: int, parts: int) -> Tensor:
    """View dimension `dim` as two: (parts, the rest)."""
    return x.view(*x.shape[:dim], parts, -1, *x.shape[dim + 1 :])
