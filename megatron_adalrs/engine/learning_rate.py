"""The learning rate in the optimizer: the one place that writes it, and DeepSpeed's range test."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.lr_schedules import LRRangeTest


def apply_learning_rate(optimizer: Any, lr: float) -> None:
    """Write the learning rate of the next step into every parameter group.

    `Trainer.learning_rate` computes it: schedule x base rate x scale of the search.

    Args:
        optimizer: DeepSpeed's optimizer, or torch's.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr


def lr_range_test(optimizer: torch.optim.Optimizer, min_lr: float) -> LRRangeTest:
    """Return DeepSpeed's range-test scheduler, which increases the rate linearly from `min_lr`."""
    return LRRangeTest(optimizer, lr_range_test_min_lr=min_lr, lr_range_test_step_size=1)
