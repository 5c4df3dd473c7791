"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_adalrs.config.base import Fraction, Group, require

DecayShape = Literal["linear", "cosine", "exponential", "minus_sqrt"]


class OptimizerConfig(Group):
    """Optimizer and learning-rate schedule. The rate of a step is schedule(step) x lr x AdaLRS scale."""

    lr: PositiveFloat
    """Base (peak) learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Floor of the decay, in the unit of lr; AdaLRS scales it along with lr."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the schedule after the warm-up."""
    lr_decay_iters: PositiveInt | None = None
    """Step at which the decay reaches min_lr. Default: train_iters."""
    lr_warmup_iters: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    lr_wsd_decay_style: DecayShape = "exponential"
    """Shape of the last phase of WSD."""
    lr_wsd_decay_iters: PositiveInt | None = None
    """Length of the last phase of WSD. Default: a tenth of lr_decay_iters."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; not on biases and normalisation weights."""
    adam_beta1: Fraction = 0.9
    """First moment's decay."""
    adam_beta2: Fraction = 0.95
    """Second moment's decay."""
    adam_eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    @model_validator(mode="after")
    def _floor_below_peak(self) -> OptimizerConfig:
        require(self.min_lr <= self.lr, f"min_lr: {self.min_lr:g} is above lr {self.lr:g}")
        return self
