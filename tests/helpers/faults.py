"""Faults for tests: one rank's loss or gradients go wrong in steps that a test chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_adalrs.engine import Engine


class Fault:
    """The forward passes of one rank's part of the model go wrong while `kind` is set.

    "loss": the part's output is NaN, and with it loss and gradients; "gradient": the gradients alone;
    "spike": the output, which without a pipeline is the loss, is 50 larger.

    Args:
        choose: Returns the kind at each forward pass, in place of `kind`.
    """

    def __init__(self, engine: Engine, rank: int, choose: Callable[[], str] | None = None) -> None:
        self.kind = ""
        self._choose = choose or (lambda: self.kind)
        if dist.get_rank() == rank:
            engine.module.register_forward_hook(self._spoil)

    def _spoil(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        kind = self._choose()
        if not kind or not torch.is_grad_enabled():
            return None
        if kind == "gradient":
            output.register_hook(lambda gradient: gradient * float("nan"))
            return None
        return output * float("nan") if kind == "loss" else output + 50
