"""Activation checkpointing: recomputation in the backward pass (arXiv 1604.06174, 2205.05198)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return `function(*arguments)`, keeping only the arguments for the backward pass.

    The recomputation draws the same random numbers. Layers have no random state besides torch's global
    generator (see `random.rank_local_rng`), which torch restores.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False)
    return result
