"""Configuration of optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_adalrs.config.base import Fraction, Group, require

DecayShape = Literal["linear", "cosine", "exponential", "minus_sqrt"]


class OptimizerConfig(Group):
    """Optimizer and learning-rate schedule.

    The learning rate of a step is schedule(step) * lr * AdaLRS scale.
    """

    lr: PositiveFloat
    """Base (peak) learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay. AdaLRS scales it together with lr."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Schedule after the warm-up."""
    lr_decay_iters: PositiveInt | None = None
    """Step at which the decay ends; after it the rate is min_lr. No effect on `constant`. Default:
    train_iters."""
    lr_warmup_iters: NonNegativeInt = 0
    """Number of steps of linear warm-up; step k of n has k/n of the rate."""
    lr_wsd_decay_style: DecayShape = "exponential"
    """Decay in the last phase of WSD."""
    lr_wsd_decay_iters: PositiveInt | None = None
    """Number of steps in the last phase of WSD. Default: a tenth of lr_decay_iters."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, not applied to biases and normalization weights."""
    adam_beta1: Fraction = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Fraction = 0.95
    """Decay of Adam's second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Epsilon of Adam."""
    clip_grad: NonNegativeFloat = 1.0
    """Maximum global gradient norm; 0 disables clipping."""

    @model_validator(mode="after")
    def _floor_below_peak(self) -> OptimizerConfig:
        require(self.min_lr <= self.lr, f"min_lr: {self.min_lr:g} is above lr {self.lr:g}")
        return self
