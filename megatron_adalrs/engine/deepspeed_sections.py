"""Checks of the user's DeepSpeed settings: known sections and keys, and values that DeepSpeed accepts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Literal

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from megatron_adalrs.config.base import describe_validation_error

DataType = Literal["fp32", "fp16", "bf16"]


class Section(BaseModel):
    """Settings of DeepSpeed that have no model of its own."""

    model_config = ConfigDict(extra="forbid", strict=True)


class CommsLogger(Section):
    """`comms_logger`."""

    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[str] = []
    verbose: bool = False
    debug: bool = False


class FlopsProfiler(Section):
    """`flops_profiler`."""

    enabled: bool = False
    recompute_fwd_factor: float = 0.0
    profile_step: PositiveInt = 1
    module_depth: int = -1
    top_modules: PositiveInt = 1
    detailed: bool = True
    output_file: str | None = None


class AsyncIO(Section):
    """`aio`, the reading and writing of state that is offloaded to disk."""

    block_size: PositiveInt = 1048576
    queue_depth: PositiveInt = 8
    intra_op_parallelism: PositiveInt = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class DataTypes(Section):
    """`data_types`."""

    grad_accum_dtype: DataType | None = None


class Values(Section):
    """Top-level settings that are a single value."""

    train_batch_size: PositiveInt
    train_micro_batch_size_per_gpu: PositiveInt
    gradient_accumulation_steps: PositiveInt
    gradient_clipping: float
    communication_data_type: DataType | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: PositiveFloat = 1.0
    steps_per_print: PositiveInt | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    zero_allow_untested_optimizer: Literal[True] = True
    zero_force_ds_cpu_optimizer: bool = False


SECTIONS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "comms_logger": CommsLogger,
    "flops_profiler": FlopsProfiler,
    "aio": AsyncIO,
    "data_types": DataTypes,
}

_REMOVED = "DeepSpeed has removed it"
_UNUSED = "this program does not use it"
UNSUPPORTED = {
    "optimizer": "set by flags (--lr, --weight-decay, --adam-beta1 ...); remove it from the file",
    "scheduler": "set by flags (--lr-decay-style); remove it from the file",
    "activation_checkpointing": f"{_UNUSED}; use --recompute-granularity",
    "amp": f"{_REMOVED}; use --bf16 or --fp16",
    "autotuning": _UNUSED,
    "bfloat16": "an old name; use 'bf16'",
    "checkpoint": f"{_UNUSED}; the flags of checkpoints are --save, --save-interval, --async-save",
    "comet": f"{_UNUSED}; use --wandb-project or --tensorboard-dir",
    "compile": _UNUSED,
    "compression_training": _REMOVED,
    "csv_monitor": f"{_UNUSED}; <run_dir>/metrics.jsonl has every step",
    "curriculum_learning": _REMOVED,
    "data_efficiency": f"{_UNUSED}; the order of the data is that of --data-path and --seed",
    "data_sampling": f"{_UNUSED}; the order of the data is that of --data-path and --seed",
    "dataloader_drop_last": f"{_UNUSED}; every batch is complete",
    "datastates_ckpt": f"{_UNUSED}; use --async-save",
    "eigenvalue": _REMOVED,
    "elasticity": f"{_REMOVED}; a run resumes on any mesh",
    "expert_parallel": "models have no experts",
    "gradient_allreduce_op": "gradients are averaged over all samples of a batch",
    "graph_harvesting": _REMOVED,
    "hybrid_engine": _UNUSED,
    "managed_gradient_accumulation": "set by --global-batch-size and --micro-batch-size",
    "monitor_config": f"{_UNUSED}; use --tensorboard-dir or --wandb-project",
    "nebula": _REMOVED,
    "pipeline": f"{_UNUSED}; use --pipeline-model-parallel-size",
    "progressive_layer_drop": _REMOVED,
    "quantize_training": _REMOVED,
    "seq_parallel_communication_data_type": _UNUSED,
    "sequence_parallel_size": f"{_UNUSED}; use --context-parallel-size",
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
    "tensor_parallel": f"{_UNUSED}; use --tensor-model-parallel-size",
    "tensorboard": f"{_UNUSED}; use --tensorboard-dir",
    "timers": _UNUSED,
    "torch_autocast": f"{_UNUSED}; use --bf16 or --fp16",
    "wandb": f"{_UNUSED}; use --wandb-project",
    "weight_quantization": _UNUSED,
    "zero_optimization.cpu_offload": "an old name; use 'offload_optimizer'",
    "zero_optimization.cpu_offload_param": "an old name; use 'offload_param'",
    "zero_optimization.cpu_offload_use_pin_memory": "an old name; use 'offload_optimizer.pin_memory'",
    "zero_optimization.elastic_checkpoint": "a run resumes on any mesh without it",
    "zero_optimization.legacy_stage1": _REMOVED,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": f"{_UNUSED}; use `megatron-adalrs convert`",
    "zero_optimization.zenflow": "needs DeepSpeed's own optimizer",
    "zero_optimization.zeropp_loco_param": _REMOVED,
}
"""Settings that are refused by name, with the reason."""


def require_known(overlay: dict[str, Any]) -> None:
    """Require sections and keys that this program and this version of DeepSpeed know.

    Raises:
        ValueError: A key is not known or not supported, or a section is no JSON object.
    """
    known = {**dict.fromkeys(Values.model_fields), **SECTIONS}
    _require_names(overlay, known, "")
    for name, model in SECTIONS.items():
        if name not in overlay:
            continue
        section = overlay[name]
        if not isinstance(section, dict):
            raise ValueError(f"{name}: must be a JSON object, not {section!r}")
        names = [text for key, field in model.model_fields.items() for text in (key, field.alias) if text]
        _require_names(section, names, f"{name}.")


def require_accepted(settings: dict[str, Any]) -> None:
    """Require merged settings of which DeepSpeed accepts every value.

    Raises:
        ValueError: A value has the wrong type, is out of range or contradicts another one.
    """
    _validate(Values, {name: value for name, value in settings.items() if name not in SECTIONS}, "")
    for name, model in SECTIONS.items():
        if name in settings:
            _validate(model, settings[name], name)
    # The size of the batch follows from the flags and does not fit before all ranks have joined.
    derived = ("train_batch_size", "gradient_accumulation_steps")
    try:
        DeepSpeedConfig({name: value for name, value in settings.items() if name not in derived})
    except (AssertionError, AttributeError, DeepSpeedConfigError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"DeepSpeed refuses these settings: {error}") from None


def _require_names(section: dict[str, Any], known: Iterable[str], prefix: str) -> None:
    names = list(known)
    for key in section:
        if reason := UNSUPPORTED.get(prefix + key):
            raise ValueError(f"{prefix}{key}: {reason}")
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{prefix}{key}: not a DeepSpeed setting that this program knows{hint}")


def _validate(model: type[BaseModel], values: dict[str, Any], section: str) -> None:
    try:
        accepted = model.model_validate(values)
    except ValidationError as error:
        names_field = error.errors()[0]["loc"] and error.errors()[0]["type"] != "value_error"
        separator = "." if section and names_field else ": " if section else ""
        raise ValueError(f"{section}{separator}{describe_validation_error(error)}") from None
    except (AssertionError, AttributeError, TypeError) as error:
        raise ValueError(f"{section}: {error}") from None
    _require_kinds(accepted, values, f"{section}." if section else "")


def _require_kinds(accepted: BaseModel, values: dict[str, Any], prefix: str) -> None:
    """Require that DeepSpeed's models have not read text or a number as a boolean, or the reverse."""
    fields = {field.alias or name: name for name, field in type(accepted).model_fields.items()}
    for key, value in values.items():
        read = getattr(accepted, fields.get(key, key), value)
        if isinstance(value, dict) and isinstance(read, BaseModel):
            _require_kinds(read, value, f"{prefix}{key}.")
        elif isinstance(value, bool) != isinstance(read, bool) or (
            isinstance(value, str) and isinstance(read, int | float)
        ):
            kind = "true or false" if isinstance(read, bool) else "a number"
            raise ValueError(f"{prefix}{key}: {value!r}: must be {kind}")
