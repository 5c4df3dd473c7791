"""Find a checkpoint and read its state."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from megatron_adalrs.checkpoint.latest import current_checkpoints, read_latest
from megatron_adalrs.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    STATE,
    describe_other_versions,
    find_damage,
    read_json,
    require_format,
)
from megatron_adalrs.checkpoint.retention import checkpoints_in
from megatron_adalrs.checkpoint.train_state import TrainState
from megatron_adalrs.run_directory.identity import read_run_file

T = TypeVar("T")
log = logging.getLogger(__name__)


def find_checkpoint(load: Path, strict: bool = False, verify: bool = False, flag: str = "--load") -> Path:
    """Return the checkpoint that a path names.

    Args:
        load: A checkpoint, or a folder of checkpoints (or the file `latest` in it) or a run directory, for
            the newest complete checkpoint up to the one that `latest` names.
        strict: Refuse a damaged newest checkpoint instead of falling back to an older one with a warning.
        verify: Compare the hashes of all files, not only their presence and sizes.
        flag: The flag that gave `load`, for error messages.

    Raises:
        ValueError: There is no complete checkpoint (damaged ones are named), it has another format, or a
            folder cannot be read.
    """
    try:
        if is_checkpoint(load):
            require_format(load, flag)
            if damage := find_damage(load, verify):
                raise ValueError(f"{flag}: {load} is damaged: {damage}")
            return _warn_of_other_versions(load)
        folder = load.parent if load.name == LATEST and load.is_file() else load
        for save in _folders(folder):
            os.listdir(save)  # glob takes a folder that it may not read for an empty one
            if checkpoints_in(save):
                return _warn_of_other_versions(_newest_complete(save, strict, verify, flag))
    except OSError as error:
        raise ValueError(f"{flag}: cannot read {error.filename or load}: {error.strerror or error}") from None
    raise ValueError(f"{flag}: no checkpoint in {load}: expected {load}/iter_NNNNNNN with its {MANIFEST}")


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is one checkpoint, which may be damaged, rather than a folder of checkpoints."""
    return (path / STATE).exists() or (path / MANIFEST).exists()


def _newest_complete(save: Path, strict: bool, verify: bool, flag: str) -> Path:
    candidates, latest = current_checkpoints(save), read_latest(save)
    if latest and not (save / latest).exists() and candidates:
        log.warning("%s names %s, which is not complete", save / LATEST, latest)
    damaged: list[str] = []
    for candidate in reversed(candidates):
        require_format(candidate, flag)
        damage = find_damage(candidate, verify)
        if damage is None:
            for text in damaged:
                log.warning("skipping a damaged checkpoint: %s", text)
            return candidate
        damaged.append(f"{candidate}: {damage}")
        if strict:
            raise ValueError(
                f"{flag}: the newest checkpoint is damaged: {damaged[0]}; without --strict-load an older one "
                "is loaded"
            )
    if damaged:
        raise ValueError(f"{flag}: no complete checkpoint in {save}; damaged: {'; '.join(damaged)}")
    newer = ", ".join(path.name for path in checkpoints_in(save))
    raise ValueError(
        f"{flag}: {save / LATEST} names {latest}, which is missing, and {save} has only checkpoints of later "
        f"steps ({newer}): name one of them"
    )


def read_state(checkpoint: Path, flag: str = "--load") -> dict[str, Any]:
    """Return the state that was given to `PendingSave`, with `world_size` added.

    Raises:
        ValueError: The file cannot be read, or an entry has the wrong type.
    """
    try:
        state = read_json(checkpoint / STATE)
        if not isinstance(state, dict):
            raise ValueError("it must hold entries by name")
        for name, kind in {"world_size": int, "config": dict}.items():
            if type(state.get(name)) is not kind:
                raise ValueError(f"{name} must be {kind.__name__}, not {state.get(name)!r:.40}")
        for name in ("progress", "controller", "loss_guard", "identity", "deepspeed"):
            if type(state.get(name, {})) is not dict:
                raise ValueError(f"{name} must be dict, not {state[name]!r:.40}")
        if "progress" in state:
            TrainState.validate(state["progress"])
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag}: cannot read {checkpoint / STATE}: {error}") from None
    return state


def restore_entry(checkpoint: Path, state: dict[str, Any], entry: str, load: Callable[[Any], T]) -> T:
    """Call `load` with an entry of a checkpoint's state and return the result.

    Raises:
        ValueError: The entry is missing, or `load` failed on its content.
    """
    try:
        return load(state[entry])
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(
            f"--load: {checkpoint / STATE}: {entry} is not valid ({type(error).__name__}: {error})"
        ) from None


def _warn_of_other_versions(checkpoint: Path) -> Path:
    if versions := describe_other_versions(checkpoint):
        log.warning("%s", versions)
    return checkpoint


def _folders(path: Path) -> list[Path]:
    """Return the folders in which the checkpoints of a path may be."""
    run = read_run_file(path) or {}
    places = [path / run["save"]] if "save" in run else [path, path / "checkpoints"]
    return [folder for folder in places if folder.is_dir()]
