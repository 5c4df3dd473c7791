"""The language-model loss: output projection and cross entropy, fused so that not all logits are in memory.

Source: the chunked "linear cross entropy" of Liger Kernel (arXiv 2410.10989, section 3.2) and Wijmans et al.
(arXiv 2411.09009). The forward pass computes the gradients too, chunk by chunk, while a chunk's logits are in
memory: d loss / d logits = (softmax(logits) - onehot(target)) / n. Along a tensor axis each rank has the
logits of its range of the vocabulary. Three numbers per token are all-reduced for the softmax: the maximum,
the sum of exponentials and the target's logit (arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_adalrs.distributed.process_mesh import ONE_RANK, MeshAxis
from megatron_adalrs.parallel.mappings import all_reduce

CHUNK_ELEMENTS = 1 << 22
"""Limit of a chunk's logits, in elements."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    axis: MeshAxis = ONE_RANK,
    counted: Tensor | None = None,
) -> Tensor:
    """Return the mean cross entropy of the logits `hidden @ weight.T`.

    Rows of the whole weight from `vocab_size` on are padding: they are excluded from the softmax and their
    gradient is 0, so that the loss does not depend on how far a mesh pads the vocabulary.

    Args:
        hidden: [tokens, hidden_size], any floating dtype, the same on each rank of the axis. Its gradient
            covers this rank's part of the vocabulary: `mappings.copy` or `gather_sequence`, applied to it
            beforehand, sums the gradients of all ranks.
        weight: [rows, hidden_size], same dtype: this rank's rows of the whole weight, equally many on each
            rank.
        targets: [tokens], int64, each in [0, vocab_size).
        vocab_size: number of rows that are no padding; None: all rows.
        axis: the tensor axis.
        counted: [tokens], bool; the loss of a token is 0 where it is False, and the mean is still over all
            tokens.

    Returns:
        A float32 scalar, the same on each rank. Differentiable once, with respect to `hidden` and `weight`.
    """
    first = axis.rank * weight.shape[0]
    rows = weight.shape[0] if vocab_size is None else min(max(vocab_size - first, 0), weight.shape[0])
    local_targets = targets - first if first else targets
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch: untyped
        hidden, weight, local_targets, rows, axis, counted
    )
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The autograd function of `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: int,
        axis: MeshAxis,
        counted: Tensor | None,
    ) -> Tensor:
        """Compute the loss, and the gradients that `backward` scales.

        Args:
            ctx: torch's context.
            hidden: see `linear_cross_entropy`.
            weight: see `linear_cross_entropy`.
            targets: [tokens], int64, counted from this rank's first row.
            rows: number of rows of `weight` that are no padding.
            axis: the tensor axis.
            counted: see `linear_cross_entropy`.
        """
        tokens = hidden.shape[0]
        training = any(ctx.needs_input_grad)
        # In float16, before the loss scale is applied, a token's share of the mean may underflow and a sum
        # over tokens overflow. The backward pass divides and rounds instead.
        is_float16 = hidden.dtype == torch.float16
        ctx.pending = tokens if is_float16 else 1
        ctx.dtype = hidden.dtype
        used = weight[:rows] if rows < weight.shape[0] else weight
        # Every chunk is a collective. Counting padding rows gives each rank the same number of chunks.
        chunk_tokens = max(1, CHUNK_ELEMENTS // weight.shape[0])
        grad_hidden = torch.empty_like(hidden if training else hidden[:0])
        # The weight's gradient is a sum over chunks. In float32 it is rounded to bfloat16 once, at the end.
        shape = weight.shape if training else (0,)
        grad_weight = torch.zeros(shape, dtype=torch.float32, device=weight.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, tokens, chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = (hidden[chunk] @ used.t()).float()  # [chunk, rows]
            ignored = None if counted is None else ~counted[chunk].unsqueeze(1)
            loss, grad_logits = _cross_entropy(
                logits, targets[chunk], tokens // ctx.pending, axis, training, ignored
            )
            total += loss
            if grad_logits is not None:
                grad_logits = grad_logits.to(hidden.dtype)
                torch.mm(grad_logits, used, out=grad_hidden[chunk])
                if grad_logits.dtype == torch.float32:
                    grad_weight[:rows].addmm_(grad_logits.t(), hidden[chunk])
                else:
                    grad_weight[:rows] += grad_logits.t() @ hidden[chunk]
        if training:
            ctx.gradients = (grad_hidden, grad_weight if is_float16 else grad_weight.to(weight.dtype))
        return total / tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        """Scale the gradients of the forward pass in place."""
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: the first backward pass scaled the gradients in place")
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        grad_loss = grad_loss / ctx.pending
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss).to(ctx.dtype), None, None, None, None


def _cross_entropy(
    logits: Tensor, targets: Tensor, tokens: int, axis: MeshAxis, training: bool, ignored: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the sum of a chunk's losses, and its gradient divided by `tokens`.

    Args:
        logits: [chunk, rows], overwritten: the gradient uses its memory.
        targets: [chunk], int64, counted from this rank's first row.
        tokens: the number that the gradient is divided by.
        axis: the tensor axis.
        training: whether to compute the gradient; it is None otherwise.
        ignored: [chunk, 1], bool; tokens whose loss is 0.
    """
    target = targets.unsqueeze(1)  # [chunk, 1]
    step = logits.new_full(target.shape, -1.0 / tokens)
    if axis.size == 1:
        logits -= logits.amax(dim=1, keepdim=True)
        target_logit = logits.gather(1, target)
        denominator = logits.exp_().sum(dim=1, keepdim=True)
    else:
        here = (target >= 0) & (target < logits.shape[1])
        target = target.masked_fill(~here, 0)
        step = step.masked_fill(~here, 0.0)
        # A rank whose rows are all padding has no logits, so `amax` and `gather` would fail.
        is_idle = logits.shape[1] == 0
        largest = torch.full_like(step, -torch.inf) if is_idle else logits.amax(dim=1, keepdim=True)
        all_reduce(largest, axis, dist.ReduceOp.MAX)
        logits -= largest
        own = torch.zeros_like(step) if is_idle else logits.gather(1, target).masked_fill(~here, 0.0)
        sums = all_reduce(torch.cat([own, logits.exp_().sum(dim=1, keepdim=True)], dim=1), axis)
        target_logit, denominator = torch.split(sums, 1, dim=1)
    if ignored is None:
        loss = denominator.log().sum() - target_logit.sum()
    else:
        loss = (denominator.log() - target_logit).masked_fill(ignored, 0.0).sum()
    if not training:
        return loss, None
    gradient = logits.div_(denominator * tokens)
    if gradient.shape[1]:
        gradient.scatter_add_(1, target, step)
    if ignored is not None:
        gradient.masked_fill_(ignored, 0.0)
    return loss, gradient
