"""Checks that a checkpoint can be resumed: what `config/on_resume.py` says of each field, and the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_adalrs.adalrs.settings import is_over
from megatron_adalrs.checkpoint.deepspeed_changes import deepspeed_changes, require_same_layout
from megatron_adalrs.checkpoint.load import restore_entry
from megatron_adalrs.checkpoint.manifest import STATE
from megatron_adalrs.checkpoint.model_shape import shape_of
from megatron_adalrs.config import NESTED, Config, ModelConfig
from megatron_adalrs.config.base import describe_validation_error
from megatron_adalrs.config.on_resume import ON_RESUME, OnResume, policy_of
from megatron_adalrs.config.parallel import ParallelConfig
from megatron_adalrs.distributed.process_mesh import MeshShape, ProcessMesh
from megatron_adalrs.engine.deepspeed_config import deepspeed_settings

DOCUMENTS = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
SAVED_FIELDS = (
    *DOCUMENTS,
    "bf16",
    "fp16",
    "zero_stage",
    "micro_batch_size",
    *ParallelConfig.model_fields,
)
"""Fields that the saved configuration of every run must have."""


def require_compatible(checkpoint: Path, state: dict[str, Any], config: Config, mesh: ProcessMesh) -> None:
    """Check that this run may resume a checkpoint: every field that differs is one that may.

    Raises:
        ValueError: A field may not differ; the message names it and both values.
    """
    if missing := [name for name in SAVED_FIELDS if name not in state["config"]]:
        raise ValueError(f"--load: {checkpoint / STATE}: config has no {missing[0]}")
    try:
        changed = changes_since(state, config, mesh)
    except ValidationError as error:
        raise ValueError(
            f"--load: {checkpoint / STATE}: config: {describe_validation_error(error)}"
        ) from None
    step = restore_entry(checkpoint, state, "progress", lambda progress: int(progress["step"]))
    train_iters = config.training.train_iters
    if train_iters < step:
        raise ValueError(
            f"--load: {checkpoint} is at step {step}, and train_iters is {train_iters}: it must be at "
            f"least {step}"
        )
    search_end = (
        restore_entry(checkpoint, state, "controller", _end_of_search) if "controller" in state else None
    )
    for name, (theirs, ours) in changed.items():
        differs = f"--load: {checkpoint} has {name} {theirs!r}, this run has {ours!r}"
        policy = policy_of(name)
        if policy is OnResume.SAME:
            raise ValueError(f"{differs}: it must be the same; {_flag(name, theirs)}")
        if policy is OnResume.SEARCH and search_end is not None:
            raise ValueError(
                f"{differs}: the learning-rate search is still running, until about step {search_end}; "
                f"{_flag(name, theirs)}, and change it when the search has ended"
            )
    if differences := mesh_differences(state, config, mesh):
        _require_movable(checkpoint, config, mesh, differences[0])
    else:
        require_same_layout(checkpoint, state, config, mesh)


def changes_since(state: dict[str, Any], config: Config, mesh: ProcessMesh) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ from those of a checkpoint, with its value and that of this run.

    Values are compared as they take effect: a field without a value is equal to one with the value that
    follows from others. Fields that concern only a process are left out.
    """
    theirs = _effective_values(state["config"], saved_mesh_shape(state).data)
    ours = _effective_values(config.to_flat(), mesh.data.size)
    return {
        name: (theirs.get(name), ours.get(name))
        for name, policy in ON_RESUME.items()
        if policy is not OnResume.IRRELEVANT and theirs.get(name) != ours.get(name)
    } | deepspeed_changes(state, config, mesh)


def _effective_values(flat: dict[str, Any], data_parallel_size: int) -> dict[str, Any]:
    """Return the fields of a flat configuration by their full names, with the values that take effect."""
    nested = {f"{group}.{name}": value for group in NESTED for name, value in flat.get(group, {}).items()}
    model = ModelConfig(**{name: flat[name] for name in ModelConfig.model_fields if name in flat})
    values = flat | nested | model.model_dump(mode="json") | shape_of(model)
    values["global_batch_size"] = (
        flat.get("global_batch_size") or flat["micro_batch_size"] * data_parallel_size
    )
    if not any(flat.get(name) for name in DOCUMENTS):
        values["eod_token_id"] = None
    decay_iters = values["lr_decay_iters"] = flat.get("lr_decay_iters") or flat.get("train_iters")
    if flat.get("lr_decay_style") != "WSD":
        values["lr_wsd_decay_style"] = values["lr_wsd_decay_iters"] = None
    elif decay_iters:
        values["lr_wsd_decay_iters"] = flat.get("lr_wsd_decay_iters") or max(1, decay_iters // 10)
    return values


def _end_of_search(controller: dict[str, Any]) -> int | None:
    """Return the step at which a saved search ends; None if it is over, or there was none."""
    if controller["mode"] == "fixed" or is_over(controller):
        return None
    end: int = controller["plan"]["search_end"]
    return end


def _flag(name: str, value: Any) -> str:
    """Return what to do on the command line so that a field has a value."""
    flag = name.replace("_", "-")
    if value is None:
        return f"leave out --{flag}"
    if isinstance(value, bool):
        group, _, field = flag.rpartition(".")
        return f"use --{flag}" if value else f"use --{group + '.' if group else ''}no-{field}"
    return f"use --{flag} {value}"


def mesh_differences(state: dict[str, Any], config: Config, mesh: ProcessMesh) -> list[str]:
    """Return the differences in mesh and ZeRO stage between a checkpoint and this run, one phrase each."""
    saved, found = state["config"], []
    pairs = [(name, getattr(config.parallel, name)) for name in type(config.parallel).model_fields]
    for name, value in [*pairs, ("zero_stage", config.training.zero_stage)]:
        if saved[name] != value:
            found.append(f"{name} {saved[name]!r}, this run has {value!r}")
    if state["world_size"] != mesh.world_size:
        found.append(f"world_size {state['world_size']}, this run has {mesh.world_size}")
    return found


def _require_movable(checkpoint: Path, config: Config, mesh: ProcessMesh, difference: str) -> None:
    """Check that a run can be resumed on another mesh."""
    begin = f"--load: {checkpoint} was written on another mesh ({difference}): "
    if config.training.fp16:
        raise ValueError(
            f"{begin}the loss scale of fp16 cannot be transferred; use the same mesh, or resume a bf16 run"
        )
    zero = deepspeed_settings(config, mesh.data.size)["zero_optimization"]
    for name in ("offload_optimizer", "offload_param"):
        if name in zero:
            raise ValueError(
                f"{begin}optimizer state cannot be loaded into memory of {name}; remove it from "
                "--deepspeed-config, or use the same mesh"
            )


def saved_mesh_shape(state: dict[str, Any]) -> MeshShape:
    """Return the shape of the mesh that wrote a checkpoint."""
    sizes = ParallelConfig(**{name: state["config"][name] for name in ParallelConfig.model_fields}).sizes
    return MeshShape.of_world(state["world_size"], **sizes)


def require_same_tokenizer(model: str, theirs: str | None, ours: str | None) -> None:
    """Check that a model and a run's data have the same tokenizer, if the digests of both are known.

    Raises:
        ValueError: The digests differ.
    """
    if theirs and ours and theirs != ours:
        raise ValueError(
            f"{model} was trained with a different tokenizer (SHA-256 {theirs:.12}) than the one of "
            f"this data ({ours:.12}): they must be the same"
        )


def require_same_data(checkpoint: Path, state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Check that a run has the vocabulary of a checkpoint, and the same data in the same order.

    Raises:
        ValueError: They differ; the message names the field and both values.
    """
    saved = state["identity"]
    if saved["vocab_size"] != identity["vocab_size"]:
        raise ValueError(
            f"--load: {checkpoint} has vocab_size {saved['vocab_size']}, this run has "
            f"{identity['vocab_size']}"
        )
    require_same_tokenizer(f"--load: {checkpoint}", saved["tokenizer_sha256"], identity["tokenizer_sha256"])
    theirs, ours = saved["blend"], identity["blend"]
    if list(theirs.values()) != list(ours.values()):
        shown = [", ".join(f"{share} {name}" for name, share in blend.items()) for blend in (theirs, ours)]
        raise ValueError(
            f"--load: {checkpoint} was trained on a blend of {shown[0]}, this run has {shown[1]}: corpora, "
            "their sizes and blend_sizes must be the same"
        )
    if saved["data_order"] != identity["data_order"]:
        raise ValueError(
            f"--load: {checkpoint} was trained with data order {saved['data_order']}, this run has "
            f"{identity['data_order']}: data_path (or train_data_path), split, seed and seq_length must be "
            "the same"
        )
