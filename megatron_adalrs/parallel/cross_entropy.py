"""The language-model loss: output projection and cross entropy in one function that never holds all logits.

Source: the chunked "linear cross entropy" of Liger Kernel (arXiv 2410.10989, section 3.2) and Wijmans et al.
(arXiv 2411.09009). The gradients are computed in the forward pass, chunk by chunk, while the chunk's logits
are at hand: d loss / d logits = (softmax(logits) - onehot(target)) / n. Along a tensor axis each rank has the
logits of its range of the vocabulary, and what a softmax needs of the others is all-reduced: the maximum, the
sum of exponentials and the target's logit (arXiv 1909.08053, section 3), three numbers a token.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_adalrs.distributed.process_mesh import ONE_RANK, MeshAxis

CHUNK_ELEMENTS = 1 << 22


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    axis: MeshAxis = ONE_RANK,
    counted: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy of the logits `hidden @ weight.T`, over the first `vocab_size` rows of the whole
    weight.

    Rows from `vocab_size` on are padding: they take no part in the softmax and their gradient is 0, so that
    the loss does not depend on how far a mesh pads the vocabulary.

    Args:
        hidden: [tokens, hidden_size], any floating dtype, the same on each rank of the axis. Its gradient is
            that of this rank's part of the vocabulary: pass it through `mappings.copy` or `gather_sequence`,
            which add them up.
        weight: [rows, hidden_size], same dtype: this rank's rows of the whole weight, as many on each rank.
        targets: [tokens], int64, each in [0, vocab_size).
        vocab_size: default: all rows.
        counted: [tokens], bool: where it is False, a token's loss is taken as 0; the mean is over all tokens
            still.

    Returns:
        Scalar, float32, the same on each rank. Differentiable once, with respect to `hidden` and `weight`.
    """
    first = axis.rank * weight.shape[0]
    rows = weight.shape[0] if vocab_size is None else min(max(vocab_size - first, 0), weight.shape[0])
    return _LinearCrossEntropy.apply(
        hidden, weight, targets - first if first else targets, rows, axis, counted
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        rows: int,
        axis: MeshAxis,
        counted: Tensor | None,
    ) -> Tensor:
        """`targets` count from this rank's first row; `rows`: those of `weight` that are no padding."""
        tokens, training = hidden.shape[0], any(ctx.needs_input_grad)
        # In float16 a token's share of the mean is too small a number, and a sum over tokens may be too large
        # a one, before the loss scale is applied: division and rounding are left to the backward pass.
        is_float16 = hidden.dtype == torch.float16
        ctx.pending, ctx.dtype = tokens if is_float16 else 1, hidden.dtype
        used = weight[:rows] if rows < weight.shape[0] else weight
        # By the rows with their padding: as many chunks on each rank, since every chunk is a collective.
        chunk_tokens = max(1, CHUNK_ELEMENTS // weight.shape[0])
        grad_hidden = torch.empty_like(hidden) if training else None
        # Several chunks add up in the weight's gradient: in float32, so that bfloat16 is rounded once, at the
        # end.
        grad_weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if training else None
        )
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, tokens, chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = (hidden[chunk] @ used.t()).float()  # [chunk, rows]
            ignored = None if counted is None else ~counted[chunk].unsqueeze(1)
            loss, grad_logits = _cross_entropy(
                logits, targets[chunk], tokens // ctx.pending, axis, training, ignored
            )
            total += loss
            if training:
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
    def backward(ctx, grad_loss: Tensor):  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: its gradients were scaled in place by a first backward pass"
            )
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        grad_loss = grad_loss / ctx.pending
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss).to(ctx.dtype), None, None, None, None


def _cross_entropy(
    logits: Tensor, targets: Tensor, tokens: int, axis: MeshAxis, training: bool, ignored: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Sum of a chunk's losses, and that sum's gradient / `tokens` with respect to its logits [chunk, rows].

    Overwrites `logits`; the gradient is made in its memory. `ignored`: [chunk, 1], bool, tokens whose loss is
    0.
    """
    target = targets.unsqueeze(1)  # [chunk, 1]
    step = logits.new_full(target.shape, -1.0 / tokens)
    if axis.size == 1:
        logits -= logits.amax(dim=1, keepdim=True)
        target_logit = logits.gather(1, target)
        denominator = logits.exp_().sum(dim=1, keepdim=True)
    else:
        here = (target >= 0) & (target < logits.shape[1])
        target, step = target.masked_fill(~here, 0), step.masked_fill(~here, 0.0)
        # A rank whose rows are all padding has no logits, and the maximum of nothing is not defined.
        is_idle = logits.shape[1] == 0
        largest = torch.full_like(step, -torch.inf) if is_idle else logits.amax(dim=1, keepdim=True)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=axis.group)
        logits -= largest
        mine = torch.zeros_like(step) if is_idle else logits.gather(1, target).masked_fill(~here, 0.0)
        sums = torch.cat([mine, logits.exp_().sum(dim=1, keepdim=True)], dim=1)
        dist.all_reduce(sums, group=axis.group)
        target_logit, denominator = sums.split(1, dim=1)
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
