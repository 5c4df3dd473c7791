"""Long sequences: ranks of the context axis hold a part of every sequence, and trade it for a part of the
heads where attention needs the whole sequence. Source: DeepSpeed-Ulysses (arXiv 2309.14509, section 3.1).

Shapes: c = ranks of the axis, b = micro batch, s = sequence, n = query heads, g = key-value heads, d = head
size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_adalrs.distributed.process_mesh import MeshAxis
from megatron_adalrs.parallel.mappings import all_to_all


def part_of_sequence(x: Tensor, axis: MeshAxis) -> Tensor:
    """This rank's part [b, s / c] of tokens [b, s]. No gradient passes.

    Raises:
        ValueError: the axis does not divide the sequence.
    """
    if x.shape[1] % axis.size:
        raise ValueError(
            f"a sequence of {x.shape[1]} tokens is not divisible by {axis.size} context-parallel ranks"
        )
    return x.chunk(axis.size, dim=1)[axis.rank]


def share_heads(q: Tensor, k: Tensor, v: Tensor, axis: MeshAxis) -> tuple[Tensor, Tensor, Tensor]:
    """A part of every sequence for all heads -> every sequence for a part of the heads, in one all-to-all.

    Args:
        q: [b, n, s / c, d]; the axis divides n.
        k, v: [b, g, s / c, d]; where the axis does not divide g, they are repeated to n heads first.

    Returns:
        q [b, n / c, s, d], and k, v [b, g / c, s, d] or [b, n / c, s, d].
    """
    if axis.size == 1:
        return q, k, v
    if k.shape[1] % axis.size:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    parts = [t.unflatten(1, (axis.size, -1)) for t in (q, k, v)]  # each [b, c, heads / c, s / c, d]
    mixed = all_to_all(torch.cat(parts, dim=2).transpose(0, 1), axis)  # [c, b, all heads / c, s / c, d]
    whole = mixed.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [b, all heads / c, s, d]
    return whole.split([part.shape[2] for part in parts], dim=1)  # type: ignore[return-value]


def share_sequence(y: Tensor, axis: MeshAxis) -> Tensor:
    """The way back: [b, n / c, s, d] -> [b, n, s / c, d]."""
    if axis.size == 1:
        return y
    parts = y.unflatten(2, (axis.size, -1)).movedim(2, 0)  # [c, b, n / c, s / c, d]
    return all_to_all(parts, axis).movedim(0, 1).flatten(1, 2)
