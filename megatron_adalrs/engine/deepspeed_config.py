"""DeepSpeed's own configuration, made from the flags and overlaid with the user's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_adalrs.config import Config

FLAG_OF_KEY = {
    "train_batch_size": "--global-batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--global-batch-size and --micro-batch-size",
    "gradient_clipping": "--clip-grad",
    "zero_optimization.stage": "--zero-stage",
    "bf16.enabled": "--bf16",
    "fp16.enabled": "--fp16",
}
OWNED_KEYS = {
    "optimizer": "--lr, --weight-decay, --adam-beta1 ...",
    "scheduler": "--lr-decay-style",
}


def deepspeed_settings(config: Config, data_parallel_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: what the flags say, overlaid with the user's own file.

    Raises:
        ValueError: the file cannot be read, or one of its keys contradicts a flag (both are named).
    """
    training = config.training
    ours: dict[str, Any] = {
        "train_batch_size": config.global_batch_size(data_parallel_size),
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": config.micro_batches_per_step(data_parallel_size),
        "gradient_clipping": config.optimizer.clip_grad,
        "zero_optimization": {"stage": training.zero_stage},
        "bf16": {"enabled": training.bf16},
        "fp16": {"enabled": training.fp16},
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        # On processors torch's optimizer works on offloaded state as well as DeepSpeed's.
        "zero_force_ds_cpu_optimizer": False,
    }
    if training.deepspeed_config is None:
        return ours
    settings = _overlaid(ours, read_deepspeed_overlay(training.deepspeed_config), training.deepspeed_config)
    _require_possible_offload(settings["zero_optimization"], config)
    if config.loss_guard.policy != "off" and not settings["zero_optimization"].get("compute_grad_norm", True):
        raise ValueError(
            f"--deepspeed-config: {training.deepspeed_config}: zero_optimization.compute_grad_norm = False "
            f"leaves "
            f"unknown whether gradients are finite; loss_guard.policy {config.loss_guard.policy!r} needs it"
        )
    return settings


def read_deepspeed_overlay(path: Path) -> dict[str, Any]:
    """The user's DeepSpeed settings.

    Raises:
        ValueError: unreadable, not a JSON object, or with a section that the flags own.
    """
    try:
        overlay = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--deepspeed-config: cannot read {path}: {error}") from None
    if not isinstance(overlay, dict):
        raise ValueError(
            f"--deepspeed-config: {path} must hold a JSON object, not a {type(overlay).__name__}"
        )
    for key, flags in OWNED_KEYS.items():
        if key in overlay:
            raise ValueError(
                f"--deepspeed-config: {path}: {key!r} is set by flags here ({flags}); remove it from the file"
            )
    return overlay


def _require_possible_offload(zero: dict[str, Any], config: Config) -> None:
    path, stage = config.training.deepspeed_config, config.training.zero_stage
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (zero.get(name) or {}).get("device", "none")
        if device == "none":
            zero.pop(name, None)
            continue
        place = f"--deepspeed-config: {path}: zero_optimization.{name}.device = {device!r}"
        if stage < lowest:
            raise ValueError(f"{place} needs --zero-stage {lowest} or higher, not {stage}")
        if device != "cpu" and config.live_snapshots:
            raise ValueError(
                f"{place}: a snapshot copies the optimizer's memory, which must not be swapped to disk; "
                "use 'cpu', or --adalrs.no-enabled and no --loss-guard.policy rewind"
            )


def _overlaid(ours: dict[str, Any], overlay: dict[str, Any], path: Path, prefix: str = "") -> dict[str, Any]:
    merged = dict(ours)
    for key, value in overlay.items():
        name = prefix + key
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = _overlaid(ours[key], value, path, prefix=f"{name}.")
        elif name in FLAG_OF_KEY and value != ours[key] and value != "auto":
            raise ValueError(
                f"--deepspeed-config: {path}: {name} = {value!r} contradicts {FLAG_OF_KEY[name]}, "
                f"which makes it {ours[key]!r}"
            )
        elif value != "auto":
            merged[key] = value
    return merged
