"""Resuming: exactly, on the mesh and ZeRO stage that wrote a checkpoint; on another, parameter by
parameter."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from megatron_adalrs.checkpoint.compatibility import mesh_differences, saved_mesh_shape
from megatron_adalrs.checkpoint.load import load_checkpoint
from megatron_adalrs.checkpoint.manifest import ENGINE
from megatron_adalrs.config import Config
from megatron_adalrs.distributed.collectives import on_every_rank
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine import Engine, SavedMesh, TrainingTensors, open_training
from megatron_adalrs.snapshot.rng_state import seed_everything


def resume(
    engine: Engine, mesh: ProcessMesh, checkpoint: Path, state: dict[str, Any], config: Config
) -> None:
    """Load a checkpoint that fits (`require_compatible`) into an engine that has not stepped yet. Collective.

    On the mesh that wrote it the following steps are the same to the bit. On another the sums of
    floating-point numbers go other ways; and as no rank's random streams are those of another mesh's, they
    are seeded from the run's seed and the step: dropout is other dropout.

    Raises:
        ValueError: on every rank, if it cannot be read.
    """
    if not mesh_differences(state, config, mesh):
        load_checkpoint(engine, mesh, checkpoint)
        return
    shape, saved = saved_mesh_shape(state), state["config"]
    written = SavedMesh(saved["zero_stage"], shape.pipe, shape.tensor, saved["pipeline_partition"])
    engine.load_resharded(on_every_rank(lambda: _open(checkpoint, state, config, written)))
    seed_everything(_seed_at(config.training.seed, state["progress"]["step"]), mesh.tensor_group)


def describe_resume(checkpoint: Path, state: dict[str, Any], config: Config, mesh: ProcessMesh) -> str:
    """What a person reads about it."""
    at = f"{checkpoint} at step {state['progress']['step']}"
    if not (differences := mesh_differences(state, config, mesh)):
        return f"resumed from {at}"
    return (
        f"resumed on another mesh: from {at}, written with {'; '.join(differences)}; "
        "random streams (dropout) begin anew"
    )


def _open(checkpoint: Path, state: dict[str, Any], config: Config, written: SavedMesh) -> TrainingTensors:
    try:
        return open_training(checkpoint / ENGINE, config.model, state["identity"]["vocab_size"], written)
    except ValueError as error:
        raise ValueError(f"--load: {error}") from None


def _seed_at(seed: int, step: int) -> int:
    digest = hashlib.sha256(f"{seed}:resumed at {step}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
