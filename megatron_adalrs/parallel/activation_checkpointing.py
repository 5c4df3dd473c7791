"""Activations that are not kept for the backward pass but computed again there (arXiv 1604.06174,
2205.05198)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, of which the backward pass keeps the arguments alone.

    The second run draws the random numbers of the first: torch's stream is all the random state that the
    layers have (see `random.own_stream`), and torch puts it back, so snapshots and checkpoints need to know
    of nothing else.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False)
