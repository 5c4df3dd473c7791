"""DeepSpeed's configuration, built from the flags and merged with the user's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_adalrs.config import Config
from megatron_adalrs.engine.deepspeed_sections import require_accepted, require_known
from megatron_adalrs.utils.text_files import parse_json, read_text

FLAG_OF_KEY = {
    "train_batch_size": "--global-batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--global-batch-size and --micro-batch-size",
    "gradient_clipping": "--clip-grad",
    "zero_optimization.stage": "--zero-stage",
    "bf16.enabled": "--bf16",
    "fp16.enabled": "--fp16",
}


def deepspeed_settings(config: Config, data_parallel_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the values of flags, merged with the user's file.

    Args:
        config: the configuration of the run.
        data_parallel_size: size of the data-parallel axis, without the context axis.

    Raises:
        ValueError: the file cannot be read, or one of its keys contradicts a flag.
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
        # On CPUs torch's optimizer can update offloaded state too.
        "zero_force_ds_cpu_optimizer": False,
    }
    if training.deepspeed_config is None:
        return ours
    settings = _merge(ours, read_deepspeed_overlay(training.deepspeed_config), training.deepspeed_config)
    try:
        require_accepted(settings)
    except ValueError as error:
        raise ValueError(f"--deepspeed-config: {training.deepspeed_config}: {error}") from None
    _require_possible_offload(settings["zero_optimization"], config)
    if config.loss_guard.policy != "off" and not settings["zero_optimization"].get("compute_grad_norm", True):
        raise ValueError(
            f"--deepspeed-config: {training.deepspeed_config}: zero_optimization.compute_grad_norm must not "
            f"be False with loss_guard.policy {config.loss_guard.policy!r}, which needs the gradient norm"
        )
    return settings


def settings_beside_flags(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values that no flag sets, by keys such as `zero_optimization.overlap_comm`.

    Args:
        settings: what `deepspeed_settings` returned.
        prefix: keys of the section that `settings` is, with a dot at the end.
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = prefix + key
        if isinstance(value, dict):
            found |= settings_beside_flags(value, f"{name}.")
        elif name not in FLAG_OF_KEY:
            found[name] = value
    return found


def read_deepspeed_overlay(path: Path) -> dict[str, Any]:
    """Read the user's DeepSpeed settings.

    Raises:
        ValueError: the file cannot be read, is no JSON object, or has settings that are not
            known or not supported.
    """
    try:
        overlay = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"--deepspeed-config: cannot read {path}: {error}") from None
    if not isinstance(overlay, dict):
        raise ValueError(
            f"--deepspeed-config: {path} must contain a JSON object, not a {type(overlay).__name__}"
        )
    try:
        require_known(overlay)
    except ValueError as error:
        raise ValueError(f"--deepspeed-config: {path}: {error}") from None
    return _without_auto(overlay)


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """Remove every key with the value "auto", which leaves it to the flags or to DeepSpeed's default."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }


def _require_possible_offload(zero: dict[str, Any], config: Config) -> None:
    path, stage = config.training.deepspeed_config, config.training.zero_stage
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (zero.get(name) or {}).get("device", "none")
        if device == "none":
            zero.pop(name, None)
            continue
        place = f"--deepspeed-config: {path}: zero_optimization.{name}.device = {device!r}"
        if stage < lowest:
            raise ValueError(f"{place} requires --zero-stage {lowest} or higher, not {stage}")
        if device != "cpu" and config.live_snapshots:
            raise ValueError(
                f"{place}: snapshots copy the optimizer's state from memory; "
                "use 'cpu', or --adalrs.mode off without --loss-guard.policy rewind"
            )


def _merge(ours: dict[str, Any], overlay: dict[str, Any], path: Path, prefix: str = "") -> dict[str, Any]:
    merged = dict(ours)
    for key, value in overlay.items():
        name = prefix + key
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = _merge(ours[key], value, path, prefix=f"{name}.")
        elif name in FLAG_OF_KEY and value != ours[key]:
            raise ValueError(
                f"--deepspeed-config: {path}: {name} = {value!r} contradicts {FLAG_OF_KEY[name]}, "
                f"which sets it to {ours[key]!r}"
            )
        else:
            merged[key] = value
    return merged
