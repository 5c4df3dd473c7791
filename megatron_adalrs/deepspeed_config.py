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
}
OWNED_KEYS = {
    "optimizer": "--lr, --weight-decay, --adam-beta1 ...",
    "scheduler": "--lr-decay-style",
    "fp16": "--bf16",
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
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
    }
    if training.deepspeed_config is None:
        return ours
    return _overlaid(ours, read_deepspeed_overlay(training.deepspeed_config), training.deepspeed_config)


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
        raise ValueError(f"--deepspeed-config: {path} must hold a JSON object, not a {type(overlay).__name__}")
    for key, flags in OWNED_KEYS.items():
        if key in overlay:
            raise ValueError(
                f"--deepspeed-config: {path}: {key!r} is set by flags here ({flags}); remove it from the file"
            )
    return overlay


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
