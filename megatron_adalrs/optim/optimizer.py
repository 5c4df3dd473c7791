"""The optimizers, by name, built from `OptimizerConfig`.

To add one, write a function like `adamw`, add it to `OPTIMIZERS`, add a field that selects it to
`OptimizerConfig`, and pass this field to `build_optimizer` in `engine/base.py`. `engine.saved_optimizer`
lists the optimizer state that a checkpoint can carry over to another mesh, and `planning.memory` counts its
bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megatron_adalrs.config import OptimizerConfig
from megatron_adalrs.optim.param_groups import weight_decay_groups

OptimizerClass = Callable[..., torch.optim.Optimizer]
ParamGroups = list[dict[str, Any]]


def adamw(
    groups: ParamGroups, config: OptimizerConfig, offloaded: OptimizerClass | None = None
) -> torch.optim.Optimizer:
    """Build AdamW (arXiv 1711.05101): torch's, or an `offloaded` class that takes the same arguments."""
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
    }
    if offloaded:
        return offloaded(groups, **settings)
    return torch.optim.AdamW(groups, **settings, fused=groups[0]["params"][0].is_cuda)


OPTIMIZERS = {"adamw": adamw}


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, offloaded: OptimizerClass | None = None, name: str = "adamw"
) -> torch.optim.Optimizer:
    """Build the optimizer of a model, with weight decay on matrices only.

    Args:
        offloaded: a class that runs on the CPU and replaces torch's, if optimizer state is offloaded.
        name: a key of `OPTIMIZERS`.
    """
    return OPTIMIZERS[name](weight_decay_groups(model, config.weight_decay), config, offloaded)
