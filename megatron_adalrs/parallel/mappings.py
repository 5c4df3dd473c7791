"""Differentiable collectives along an axis of the mesh.

Each function is named after its forward pass; the backward pass applies the paired operation to the
gradient. Source: Megatron-LM (arXiv 1909.08053, section 3; 2205.05198, section 4.2.2).

    function                  forward         backward        use
    copy                      identity        all-reduce      enters a region where weights are split
    reduce                    all-reduce      identity        leaves it: adds the partial sums
    scatter                   split           all-gather      continues with this rank's part of a tensor
    gather                    all-gather      split           continues with the whole tensor on each rank
    gather_sequence           all-gather      reduce-scatter  `copy` for an input split along the sequence
    reduce_scatter_sequence   reduce-scatter  all-gather      `reduce` with an output split along the sequence
    all_to_all                all-to-all      all-to-all      exchanges parts of two dimensions

Every function is a collective of the axis' process group. Along an axis of one process it returns its
argument and adds no node to the graph. The sequence is dimension 1 of [b, s, h].
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
    """Forward: this rank's part of `dim`, whose size the axis divides. Backward: all-gather."""
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
    """Exchange parts of [axis, ...]: part i is sent to rank i and replaced by the part received from it.

    Forward and backward are the same operation.
    """
    return _paired(x, axis, _exchange, _exchange)


Collective = Callable[[Tensor, MeshAxis], Tensor]


def all_reduce(x: Tensor, axis: MeshAxis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce a tensor over the ranks of an axis in place and return it. Not differentiable."""
    if axis.size > 1:
        dist.all_reduce(x, op=op, group=axis.group)
    return x


def _paired(x: Tensor, axis: MeshAxis, forward: Collective, backward: Collective) -> Tensor:
    if axis.size == 1:
        return x
    result: Tensor = _Paired.apply(x, axis, forward, backward)  # type: ignore[no-untyped-call]  # torch: untyped
    return result


class _Paired(Function):
    """An autograd function that applies one collective forward and another one backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: MeshAxis, forward: Collective, backward: Collective) -> Tensor:
        ctx.axis = axis
        ctx.pair = backward
        return forward(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.pair(grad, ctx.axis), None, None, None


def _identity(x: Tensor, axis: MeshAxis) -> Tensor:
    return x.view_as(x)


def _all_reduce(x: Tensor, axis: MeshAxis) -> Tensor:
    # The tensor may be in use elsewhere in the graph, so its copy is reduced.
    return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)


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
