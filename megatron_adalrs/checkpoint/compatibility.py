"""Checks that a checkpoint can be resumed: same model, data, precision and tokenizer; the mesh may differ."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_adalrs.checkpoint.manifest import STATE
from megatron_adalrs.config import Config, ModelConfig
from megatron_adalrs.config.model import RopeScaling
from megatron_adalrs.config.parallel import ParallelConfig
from megatron_adalrs.distributed.process_mesh import MeshShape, ProcessMesh
from megatron_adalrs.engine.deepspeed_config import deepspeed_settings

SHAPE_FREE = {"preset", "vocab_size", "seq_length", "attention_dropout", "hidden_dropout", "init_method_std"}
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
    """Check that a checkpoint can be loaded into the model that `config` describes.

    Raises:
        ValueError: They differ; the message names the field and both values.
    """
    saved, free = state["config"], SHAPE_FREE | _without_effect(config.model)
    if missing := [name for name in SAVED_FIELDS if name not in saved]:
        raise ValueError(f"--load: {checkpoint / STATE}: config has no {missing[0]}")
    for name, value in config.model.model_dump(mode="json").items():
        if name not in free and saved.get(name) != value:
            raise ValueError(f"--load: {checkpoint} has {name} {saved.get(name)!r}, this run has {value!r}")
    for name in DOCUMENTS:
        theirs, ours = saved[name], getattr(config.data, name)
        if theirs != ours:
            raise ValueError(
                f"--load: {checkpoint} was trained with {name} {theirs!r}, this run has {ours!r}"
            )
    for name in ("bf16", "fp16"):
        if saved[name] != getattr(config.training, name):
            raise ValueError(
                f"--load: {checkpoint} was written with {name} {saved[name]!r}, this run has "
                f"{getattr(config.training, name)!r}; use the same"
            )
    if differences := mesh_differences(state, config, mesh):
        _require_movable(checkpoint, state, config, mesh, differences[0])


def _without_effect(model: ModelConfig) -> set[str]:
    """Return the fields that have no effect on a model of this kind."""
    found = {"max_position_embeddings"} if model.position_embedding_type == "rope" else set()
    return (
        found
        if model.use_rope_scaling
        else found | {f"rope_scaling_{field.name}" for field in fields(RopeScaling)}
    )


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


def _require_movable(
    checkpoint: Path, state: dict[str, Any], config: Config, mesh: ProcessMesh, difference: str
) -> None:
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
    theirs, ours = _global_batch_size(state), config.global_batch_size(mesh.data.size)
    if theirs != ours:
        raise ValueError(
            f"{begin}its steps have {theirs} samples, those of this run {ours}; use --global-batch-size "
            f"{theirs}"
        )


def _global_batch_size(state: dict[str, Any]) -> int:
    saved = state["config"]
    size: int | None = saved.get("global_batch_size")
    return size or int(saved["micro_batch_size"]) * saved_mesh_shape(state).data


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
