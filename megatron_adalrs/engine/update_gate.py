"""Refusal of an update after gradients are reduced and before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class UpdateGate:
    """Asks a function before each update of an optimizer and removes the gradients of a refused update.

    Optimizers of torch and DeepSpeed leave a parameter without a gradient, its moments and its step count
    unchanged. What DeepSpeed does after the update (weights from masters, clearing gradients, counting)
    continues. DeepSpeed may call the optimizer once for each parameter group; only the first call of a step
    asks.

    Args:
        optimizer: the torch optimizer that DeepSpeed wraps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.refused = False
        """Whether the update of this step was refused."""
        self._ask: Callable[[], bool] | None = None
        optimizer.register_step_pre_hook(self._before_update)

    def set(self, ask: Callable[[], bool] | None) -> None:
        """Set, before a step, the function that returns whether to make its update; None makes it."""
        self._ask = ask
        self.refused = False

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._ask is not None:
            self.refused = not self._ask()
            self._ask = None
        if self.refused:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
