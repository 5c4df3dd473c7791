"""Settings of a run that DeepSpeed restores with the optimizer's state, and that a resumed run may change."""

from __future__ import annotations

from typing import Any, NamedTuple

from megatron_adalrs.engine.training_state import base_optimizer

CLIP_GRAD = "clip_grad"
"""Attribute of DeepSpeed's optimizers with the threshold of gradient clipping."""


class OptimizerSettings(NamedTuple):
    """Settings of an optimizer: weight decay, betas and epsilon of each group, and the clipping threshold."""

    groups: list[dict[str, Any]]
    """Entries of each parameter group except its parameters."""
    clip_grad: float | None
    """Threshold in DeepSpeed's optimizer; None if it has none."""


def read_settings(optimizer: Any) -> OptimizerSettings:
    """Return the settings of DeepSpeed's optimizer, or torch's, and of the one that it wraps."""
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in base_optimizer(optimizer).param_groups
    ]
    return OptimizerSettings(groups, getattr(optimizer, CLIP_GRAD, None))


def write_settings(optimizer: Any, settings: OptimizerSettings) -> None:
    """Set what `read_settings` returned, in place of what was loaded with the optimizer's state."""
    for group, values in zip(base_optimizer(optimizer).param_groups, settings.groups, strict=True):
        group.update(values)
    if settings.clip_grad is not None:
        setattr(optimizer, CLIP_GRAD, settings.clip_grad)
