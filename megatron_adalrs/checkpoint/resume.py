"""Resume a run: exactly on the mesh that wrote the checkpoint, parameter by parameter on another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from megatron_adalrs.checkpoint.compatibility import changes_since, mesh_differences, saved_mesh_shape
from megatron_adalrs.checkpoint.manifest import ENGINE, random_name, read_json
from megatron_adalrs.config import Config
from megatron_adalrs.config.on_resume import OnResume, policy_of
from megatron_adalrs.distributed.collectives import on_every_rank
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine import Engine, SavedMesh, TrainingTensors, open_training_state
from megatron_adalrs.snapshot.rng_state import RngState, seed_everything


def resume(
    engine: Engine, mesh: ProcessMesh, checkpoint: Path, state: dict[str, Any], config: Config
) -> None:
    """Load a compatible checkpoint into an engine that has not taken a step yet. Collective.

    On the mesh that wrote the checkpoint, the following steps are bit-identical. On another mesh,
    floating-point sums are taken in another order, and the random number generators are seeded from the
    run's seed and the step, because there is no one-to-one mapping between the generators of the two meshes.

    Raises:
        ValueError: On every rank, if the checkpoint cannot be read.
    """
    if not mesh_differences(state, config, mesh):
        load_checkpoint(engine, mesh, checkpoint)
        return
    shape, saved = saved_mesh_shape(state), state["config"]
    written = SavedMesh(saved["zero_stage"], shape.pipe, shape.tensor, saved["pipeline_partition"])
    engine.load_resharded(on_every_rank(lambda: _open(checkpoint, state, config, written)))
    seed_everything(_seed_at(config.training.seed, state["progress"]["step"]), mesh.tensor_group)


def load_checkpoint(engine: Engine, mesh: ProcessMesh, checkpoint: Path) -> None:
    """Load a checkpoint's tensors and random states on the mesh that wrote it. Collective.

    Raises:
        ValueError: On every rank and before a pickle is opened, if a random state cannot be read.
    """
    rng = on_every_rank(lambda: _read_rng_state(checkpoint / random_name(mesh.rank)))
    engine.load(checkpoint / ENGINE)
    rng.restore()


def describe_resume(checkpoint: Path, state: dict[str, Any], config: Config, mesh: ProcessMesh) -> str:
    """Return the lines of the log that say where a run resumes, on which mesh and with which changes."""
    at = f"{checkpoint} at step {state['progress']['step']}"
    lines = [f"resumed from {at}"]
    if differences := mesh_differences(state, config, mesh):
        lines = [
            f"resumed on another mesh: from {at}, written with {'; '.join(differences)}; "
            "random number generators (dropout) are reseeded"
        ]
    changes = changes_since(state, config, mesh)
    if shown := [
        f"{name} {_shown(theirs)} -> {_shown(ours)}"
        for name, (theirs, ours) in changes.items()
        if policy_of(name) is not OnResume.MESH
    ]:
        lines.append(f"changed since the checkpoint: {'; '.join(shown)}")
    scale = state.get("controller", {}).get("scale", 1.0)
    if "lr" in changes and scale != 1.0:
        theirs, ours = changes["lr"]
        lines.append(
            f"lr {ours:g} overrides the rate that the search found, {theirs * scale:.4g} (x {scale:.4g})"
        )
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)


def _read_rng_state(file: Path) -> RngState:
    try:
        return RngState.from_json(read_json(file))
    except (OSError, ValueError) as error:
        raise ValueError(f"--load: cannot read {file}: {error}") from None


def _open(checkpoint: Path, state: dict[str, Any], config: Config, written: SavedMesh) -> TrainingTensors:
    try:
        return open_training_state(
            checkpoint / ENGINE, config.model, state["identity"]["vocab_size"], written
        )
    except ValueError as error:
        raise ValueError(f"--load: {error}") from None


def _seed_at(seed: int, step: int) -> int:
    digest = hashlib.sha256(f"{seed}:resumed at {step}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
