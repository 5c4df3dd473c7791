"""Refusing an update at the last moment: gradients are reduced and their norm is known, nothing is written
yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class UpdateGate:
    """Asks before each update of the optimizer that DeepSpeed's own works with, and takes refused gradients
    away.

    Without a gradient an optimizer of torch leaves a parameter, its moments and its step count as they are,
    and so do DeepSpeed's; what DeepSpeed does after the update (weights from masters, clearing gradients,
    counting) goes on. DeepSpeed may call the optimizer once for each group of parameters: only the first call
    of a step asks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.refused = False
        """Whether the step's update was refused."""
        self._ask: Callable[[], bool] | None = None
        optimizer.register_step_pre_hook(self._before_update)

    def set(self, ask: Callable[[], bool] | None) -> None:
        """Before a step: what answers whether to make its update; None lets it pass."""
        self._ask, self.refused = ask, False

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._ask is not None:
            self.refused, self._ask = not self._ask(), None
        if self.refused:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
