"""DeepSpeed's settings of a checkpoint and of the run that resumes it: which may differ, and which do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_adalrs.config import Config
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine.deepspeed_config import deepspeed_settings, settings_beside_flags

MUST_BE_SAME: dict[str, Any] = {
    "zero_optimization.parameter_alignment": False,
    "zero_optimization.round_robin_gradients": False,
    "zero_optimization.sub_group_size": 1_000_000_000,
    "fp16.loss_scale": 0.0,
    "fp16.loss_scale_window": 1000,
    "fp16.hysteresis": 2,
    "fp16.consecutive_hysteresis": False,
    "fp16.min_loss_scale": 1,
}
"""Settings on which the layout of the optimizer's files or the saved loss scaler depends, and their defaults
(DeepSpeed 0.19.8)."""


def deepspeed_changes(state: dict[str, Any], config: Config, mesh: ProcessMesh) -> dict[str, tuple[Any, Any]]:
    """Return the settings of `--deepspeed-config` that differ from those of a checkpoint.

    Returns:
        The value of the checkpoint and that of this run by names such as
        `deepspeed_config.zero_optimization.overlap_comm`. A setting that is not given is None, or its default
        if it is in `MUST_BE_SAME`.
    """
    if "deepspeed" not in state:
        return {}
    theirs = MUST_BE_SAME | state["deepspeed"]
    ours = MUST_BE_SAME | settings_beside_flags(deepspeed_settings(config, mesh.data.size))
    return {
        f"deepspeed_config.{name}": (theirs.get(name), ours.get(name))
        for name in theirs | ours
        if theirs.get(name) != ours.get(name)
    }


def require_same_layout(checkpoint: Path, state: dict[str, Any], config: Config, mesh: ProcessMesh) -> None:
    """Check that DeepSpeed can load a checkpoint of the same mesh with the settings of this run.

    Raises:
        ValueError: A setting that must be the same differs; the message names it and both values.
    """
    for name, (theirs, ours) in deepspeed_changes(state, config, mesh).items():
        key = name.removeprefix("deepspeed_config.")
        if key in MUST_BE_SAME:
            raise ValueError(
                f"--load: {checkpoint} has {key} {theirs!r}, this run has {ours!r}: DeepSpeed cannot load it "
                f"with another value; set {key} to {theirs!r} in --deepspeed-config"
            )
