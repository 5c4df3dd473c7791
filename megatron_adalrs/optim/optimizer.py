"""The optimizer and its parameter groups."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from megatron_adalrs.config import OptimizerConfig


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, offloaded: Callable[..., torch.optim.Optimizer] | None = None
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) with weight decay on matrices only: not on biases and normalisation weights.

    Args:
        offloaded: makes the optimizer in place of torch's, from the same arguments: one that runs on the
            processor.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        # Under ZeRO-3 a parameter is flat and empty; DeepSpeed keeps its real shape beside it.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (decayed if len(shape) > 1 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    numbers = {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    if offloaded:
        return offloaded(groups, **numbers)
    return torch.optim.AdamW(groups, **numbers, fused=decayed[0].is_cuda)
