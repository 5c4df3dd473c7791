"""The language-model loss: output projection and cross entropy in one function that never holds all logits.

Source: the chunked "linear cross entropy" of Liger Kernel (arXiv 2410.10989, section 3.2) and Wijmans et al. (arXiv
2411.09009). The gradients are computed in the forward pass, chunk by chunk, while the chunk's logits are at hand:
d loss / d logits = (softmax(logits) - onehot(target)) / n.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 22


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of the logits `hidden @ weight.T`.

    Args:
        hidden: [tokens, hidden_size], any floating dtype.
        weight: [vocab_size, hidden_size], same dtype.
        targets: [tokens], int64, each in [0, vocab_size).

    Returns:
        Scalar, float32. Differentiable once, with respect to `hidden` and `weight`.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        tokens, vocab_size = hidden.shape[0], weight.shape[0]
        training = any(ctx.needs_input_grad)
        rows = max(1, CHUNK_ELEMENTS // vocab_size)
        grad_hidden = torch.empty_like(hidden) if training else None
        # Several chunks add up in the weight's gradient: in float32, so that bfloat16 is rounded once, at the end.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if training else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, tokens, rows):
            chunk = slice(start, start + rows)
            logits = (hidden[chunk] @ weight.t()).float()  # [rows, vocab_size]
            target = targets[chunk].unsqueeze(1)  # [rows, 1]
            logits -= logits.amax(dim=1, keepdim=True)
            total -= logits.gather(1, target).sum()
            denominator = logits.exp_().sum(dim=1, keepdim=True)
            total += denominator.log().sum()
            if training:
                probabilities = logits.div_(denominator.mul_(tokens))
                probabilities.scatter_add_(1, target, torch.full_like(target, -1.0 / tokens, dtype=torch.float32))
                grad_logits = probabilities.to(hidden.dtype)
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
                if grad_logits.dtype == torch.float32:
                    grad_weight.addmm_(grad_logits.t(), hidden[chunk])
                else:
                    grad_weight += grad_logits.t() @ hidden[chunk]
        if training:
            ctx.gradients = (grad_hidden, grad_weight.to(weight.dtype))
        return total / tokens

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: its gradients were scaled in place by a first backward pass")
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss), None
