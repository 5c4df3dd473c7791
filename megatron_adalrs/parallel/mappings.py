"""Collectives along an axis that autograd understands. Each one names its pair: what the forward pass does,
and what the backward pass does with the gradient. Source: Megatron-LM (arXiv 1909.08053, section 3;
2205.05198, section 4.2.2).

    function                 forward         backward        used where
    copy                     identity        all-reduce      into a region where each rank holds part of the
    weights reduce                   all-reduce      identity        out of it: the ranks' results are partial
    sums scatter                  split           all-gather      each rank has all of a tensor and goes on
    with its part gather                   all-gather      split           back: each rank goes on alike with
    all of it gather_sequence          all-gather      reduce-scatter  `copy` where the input is split along
    the sequence reduce_scatter_sequence  reduce-scatter  all-gather      `reduce` where the output is to be
    split along it all_to_all               all-to-all      all-to-all      parts of one dimension are traded
    for parts of another

Along an axis of one process each returns its argument: no node in the graph. All are collectives of the axis'
group. The sequence is dimension 1 of [b, s, h].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron_adalrs.distributed.process_mesh import MeshAxis

SEQUENCE = 1


def copy(x: Tensor, axis: MeshAxis) -> Tensor:
    """Forward: identity. Backward: all-reduce (sum)."""
    return _paired(x, axis, _identity, _all_reduce)


def reduce(x: Tensor, axis: MeshAxis) -> Tensor:
    """Forward: all-reduce (sum). Backward: identity."""
    return _paired(x, axis, _all_reduce, _identity)


def scatter(x: Tensor, axis: MeshAxis, dim: int) -> Tensor:
    """Forward: this rank's part of `dim`, which the axis divides. Backward: all-gather."""
    return _paired(x, axis, partial(_part, dim=dim), partial(_all_gather, dim=dim))


def gather(x: Tensor, axis: MeshAxis, dim: int) -> Tensor:
    """Forward: all ranks' parts, joined along `dim` in the order of the axis. Backward: this rank's part."""
    return _paired(x, axis, partial(_all_gather, dim=dim), partial(_part, dim=dim))


def gather_sequence(x: Tensor, axis: MeshAxis) -> Tensor:
    """[b, s / axis, h] -> [b, s, h]. Forward: all-gather. Backward: reduce-scatter (sum)."""
    return _paired(x, axis, partial(_all_gather, dim=SEQUENCE), partial(_reduce_scatter, dim=SEQUENCE))


def reduce_scatter_sequence(x: Tensor, axis: MeshAxis) -> Tensor:
    """[b, s, h] -> [b, s / axis, h]. Forward: reduce-scatter (sum). Backward: all-gather."""
    return _paired(x, axis, partial(_reduce_scatter, dim=SEQUENCE), partial(_all_gather, dim=SEQUENCE))


def all_to_all(x: Tensor, axis: MeshAxis) -> Tensor:
    """[axis, ..] -> [axis, ..]: part i goes to rank i, and comes from rank i. Forward and backward alike."""
    return _paired(x, axis, _exchange, _exchange)


Collective = Callable[[Tensor, MeshAxis], Tensor]


def _paired(x: Tensor, axis: MeshAxis, forward: Collective, backward: Collective) -> Tensor:
    return x if axis.size == 1 else _Paired.apply(x, axis, forward, backward)


class _Paired(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis, forward: Collective, backward: Collective) -> Tensor:  # type: ignore[override]
        ctx.axis, ctx.pair = axis, backward
        return forward(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.pair(grad, ctx.axis), None, None, None


def _identity(x: Tensor, axis: MeshAxis) -> Tensor:
    return x.view_as(x)


def _all_reduce(x: Tensor, axis: MeshAxis) -> Tensor:
    # A copy: the tensor may be in use elsewhere in the graph.
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=axis.group)
    return total


def _part(x: Tensor, axis: MeshAxis, dim: int) -> Tensor:
    return x.chunk(axis.size, dim)[axis.rank].clone(memory_format=torch.contiguous_format)


def _all_gather(x: Tensor, axis: MeshAxis, dim: int) -> Tensor:
    parts = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(parts, x.contiguous(), group=axis.group)
    return parts if dim == 0 else torch.cat(parts.chunk(axis.size), dim)


def _reduce_scatter(x: Tensor, axis: MeshAxis, dim: int) -> Tensor:
    parts = torch.cat(x.chunk(axis.size, dim))  # one rank's part after another along dimension 0
    mine = parts.new_empty(parts.shape[0] // axis.size, *parts.shape[1:])
    dist.reduce_scatter_tensor(mine, parts, group=axis.group)
    return mine


def _exchange(x: Tensor, axis: MeshAxis) -> Tensor:
    received = x.new_empty(x.shape)
    dist.all_to_all_single(received, x.contiguous(), group=axis.group)
    return received
