"""Finding the checkpoint to resume from, and loading it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from megatron_adalrs.checkpoint.manifest import (
    ENGINE,
    MANIFEST,
    STATE,
    WEIGHTS,
    describe_other_versions,
    find_damage,
    published_path,
    random_name,
    read_json,
    require_format,
    step_of,
)
from megatron_adalrs.checkpoint.train_state import TrainState
from megatron_adalrs.config import RunConfig
from megatron_adalrs.distributed.collectives import on_every_rank
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine import Engine
from megatron_adalrs.snapshot.rng_state import check_random_state, set_random_state

T = TypeVar("T")
log = logging.getLogger(__name__)


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders that are named like published checkpoints, oldest first; one set aside where a kill left none
    instead."""
    named = [path for path in folder.glob("iter_*") if path.name.removeprefix("iter_").isdecimal()]
    aside = [path for path in folder.glob(".iter_*.replaced") if not published_path(path).exists()]
    return sorted([*named, *aside], key=step_of)


def has_checkpoint(load: Path) -> bool:
    """Whether there is anything, complete or not, that `find_checkpoint` would look at."""
    return any(checkpoints_in(folder) for folder in _folders(load))


def find_checkpoint(load: Path, strict: bool = False, verify: bool = False, flag: str = "--load") -> Path:
    """The checkpoint that `--load` means: `load` itself, or the newest complete one in it or in its
    `checkpoints`.

    Args:
        strict: refuse a damaged newest one, instead of passing over it with a warning.
        verify: compare hashes, and not presence and sizes alone.
        flag: what `load` was given with, for messages.

    Raises:
        ValueError: there is none; damaged ones are named. Or it is of another format.
    """
    if (load / STATE).exists() or (load / MANIFEST).exists():
        require_format(load, flag)
        if damage := find_damage(load, verify):
            raise ValueError(f"{flag}: {load} is damaged: {damage}")
        return _told(load)
    candidates = sorted((path for folder in _folders(load) for path in checkpoints_in(folder)), key=step_of)
    damaged: list[str] = []
    for candidate in reversed(candidates):
        require_format(candidate, flag)
        damage = find_damage(candidate, verify)
        if damage is None:
            for text in damaged:
                log.warning("passing over a damaged checkpoint: %s", text)
            return _told(candidate)
        damaged.append(f"{candidate}: {damage}")
        if strict:
            raise ValueError(
                f"{flag}: the newest checkpoint is damaged: {damaged[0]}; without --strict-load an older one "
                f"is taken"
            )
    found = f"; damaged: {'; '.join(damaged)}" if damaged else ""
    raise ValueError(
        f"{flag}: no checkpoint in {load}: expected {load}/iter_NNNNNNN with its {MANIFEST}{found}"
    )


def checkpoint_to_resume(run: RunConfig) -> Path | None:
    """The checkpoint that `--load` or `--auto-resume` means; None to start afresh.

    Raises:
        ValueError: there is none that can be loaded, although one is asked for, or one was there.
    """
    load = run.load or (run.save if run.auto_resume and has_checkpoint(run.save) else None)
    if load is None:
        return None
    found = find_checkpoint(load, run.strict_load, run.verify_checkpoint)
    if (found / WEIGHTS).is_dir():
        raise ValueError(
            f"--load: {found} holds weights alone, which cannot be resumed: begin a new run with "
            f"--finetune-from {load}"
        )
    return found


def read_state(checkpoint: Path, flag: str = "--load") -> dict[str, Any]:
    """What `save_checkpoint` was given, plus `world_size`.

    Raises:
        ValueError: the file cannot be read, or an entry is not of its type.
    """
    try:
        state = read_json(checkpoint / STATE)
        if not isinstance(state, dict):
            raise ValueError("it must hold entries by name")
        for name, kind in {"world_size": int, "config": dict}.items():
            if type(state.get(name)) is not kind:
                raise ValueError(f"{name} must be {kind.__name__}, not {state.get(name)!r:.40}")
        for name in ("progress", "controller", "loss_guard", "identity"):
            if type(state.get(name, {})) is not dict:
                raise ValueError(f"{name} must be dict, not {state[name]!r:.40}")
        if "progress" in state:
            TrainState.validate(state["progress"])
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag}: cannot read {checkpoint / STATE}: {error}") from None
    return state


def restore_entry(checkpoint: Path, state: dict[str, Any], entry: str, load: Callable[[Any], T]) -> T:
    """Result of `load`, given an entry of a checkpoint's state.

    Raises:
        ValueError: there is none, or `load` raised ValueError, or failed on what is in it.
    """
    try:
        return load(state[entry])
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"--load: {checkpoint / STATE}: {entry} is not what a run saves ({told})") from None


def load_checkpoint(engine: Engine, mesh: ProcessMesh, checkpoint: Path) -> None:
    """Load a checkpoint's tensors and random streams into an engine that has not stepped yet. Collective.

    Raises:
        ValueError: on every rank, before a pickle is opened: a random stream cannot be read.
    """
    streams = on_every_rank(lambda: _read_random(checkpoint / random_name(mesh.rank)))
    engine.load(checkpoint / ENGINE)
    set_random_state(streams)


def _read_random(file: Path) -> dict[str, Any]:
    try:
        streams = read_json(file)
        check_random_state(streams)
    except (OSError, ValueError) as error:
        raise ValueError(f"--load: cannot read {file}: {error}") from None
    return streams


def _told(checkpoint: Path) -> Path:
    """The same; it is told where other versions wrote it, which DeepSpeed and torch read as far as they
    can."""
    if told := describe_other_versions(checkpoint):
        log.warning("%s", told)
    return checkpoint


def _folders(load: Path) -> list[Path]:
    return [folder for folder in (load, load / "checkpoints") if folder.is_dir()]
