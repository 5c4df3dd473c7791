"""Learning-rate schedules: constant, linear, cosine, inverse square root and WSD, with warm-up.

A schedule is a pure function from a step to a factor of the base learning rate. `Trainer.learning_rate`
multiplies it with the scale of the search, and `engine/learning_rate.py` writes the rate into the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_adalrs.config import Config

Schedule = Callable[[int], float]


def build_schedule(config: Config) -> Schedule:
    """Return the configured schedule: it maps the number of completed steps to the next step's factor.

    The values are those of Megatron-LM's `OptimizerParamScheduler.get_lr`, but for the warm-up, which is one
    step ahead of Megatron-LM's: its first step has the factor 1 / warmup here and 0 there.
    """
    optimizer = config.optimizer
    floor = optimizer.min_lr / optimizer.lr
    warmup, decay_end = optimizer.lr_warmup_iters, config.lr_decay_iters

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if optimizer.lr_decay_style == "constant":
            return 1.0
        if step > decay_end:
            return floor
        match optimizer.lr_decay_style:
            case "inverse-square-root":
                return max(floor, inverse_square_root(step, warmup))
            case "WSD":
                start = decay_end - config.lr_wsd_decay_iters
                progress = max(step - start, 0) / config.lr_wsd_decay_iters
                return decay_factor(optimizer.lr_wsd_decay_style, progress, floor)
            case style:
                return decay_factor(style, (step - warmup) / (decay_end - warmup), floor)

    return factor


def decay_factor(shape: str, progress: float, floor: float) -> float:
    """Return a factor that falls from 1 at progress 0 to `floor` at progress 1.

    Args:
        shape: "linear"; "cosine" (SGDR, arXiv 1608.03983); "minus_sqrt", 1 - sqrt(progress) (arXiv
            2405.18392); or "exponential", 2 * 0.5^progress - 1, as in Megatron-LM's WSD.
        progress: completed part of the decay, from 0 to 1.
        floor: factor at the end.
    """
    match shape:
        case "linear":
            remaining = 1.0 - progress
        case "cosine":
            remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
        case "minus_sqrt":
            remaining = 1.0 - math.sqrt(progress)
        case "exponential":
            remaining = 2.0 * 0.5**progress - 1.0
        case _:
            raise ValueError(f"lr decay shape: {shape!r}: must be linear, cosine, minus_sqrt or exponential")
    return floor + (1.0 - floor) * remaining


def inverse_square_root(step: int, warmup: int) -> float:
    """Return sqrt(warmup / step) (arXiv 1706.03762), which is 1 at the end of the warm-up."""
    return math.sqrt(max(warmup, 1) / max(step, warmup, 1))
