"""DeepSpeed's learning-rate range test."""

from __future__ import annotations

import torch
from deepspeed.runtime.lr_schedules import LRRangeTest


def lr_range_test(optimizer: torch.optim.Optimizer, min_lr: float) -> LRRangeTest:
    """Return DeepSpeed's range-test scheduler, which increases the rate linearly from `min_lr`."""
    return LRRangeTest(optimizer, lr_range_test_min_lr=min_lr, lr_range_test_step_size=1)
