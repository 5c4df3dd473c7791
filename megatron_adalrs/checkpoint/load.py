"""Find a checkpoint and read its state."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from megatron_adalrs.checkpoint.manifest import (
    MANIFEST,
    STATE,
    describe_other_versions,
    find_damage,
    read_json,
    require_format,
    step_of,
)
from megatron_adalrs.checkpoint.retention import checkpoints_in
from megatron_adalrs.checkpoint.train_state import TrainState

T = TypeVar("T")
log = logging.getLogger(__name__)


def has_checkpoint(load: Path) -> bool:
    """Return whether `find_checkpoint` would find any candidate, complete or not."""
    return any(checkpoints_in(folder) for folder in _folders(load))


def find_checkpoint(load: Path, strict: bool = False, verify: bool = False, flag: str = "--load") -> Path:
    """Return `load` itself if it is a checkpoint, else the newest complete one in it or its `checkpoints`.

    Args:
        strict: Refuse a damaged newest checkpoint instead of falling back to an older one with a warning.
        verify: Compare the hashes of all files, not only their presence and sizes.
        flag: The flag that gave `load`, for error messages.

    Raises:
        ValueError: There is no complete checkpoint (damaged ones are named), or it has another format.
    """
    if (load / STATE).exists() or (load / MANIFEST).exists():
        require_format(load, flag)
        if damage := find_damage(load, verify):
            raise ValueError(f"{flag}: {load} is damaged: {damage}")
        return _warn_of_other_versions(load)
    candidates = sorted((path for folder in _folders(load) for path in checkpoints_in(folder)), key=step_of)
    damaged: list[str] = []
    for candidate in reversed(candidates):
        require_format(candidate, flag)
        damage = find_damage(candidate, verify)
        if damage is None:
            for text in damaged:
                log.warning("skipping a damaged checkpoint: %s", text)
            return _warn_of_other_versions(candidate)
        damaged.append(f"{candidate}: {damage}")
        if strict:
            raise ValueError(
                f"{flag}: the newest checkpoint is damaged: {damaged[0]}; without --strict-load an older one "
                "is loaded"
            )
    found = f"; damaged: {'; '.join(damaged)}" if damaged else ""
    raise ValueError(
        f"{flag}: no checkpoint in {load}: expected {load}/iter_NNNNNNN with its {MANIFEST}{found}"
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
        for name in ("progress", "controller", "loss_guard", "identity"):
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


def _folders(load: Path) -> list[Path]:
    return [folder for folder in (load, load / "checkpoints") if folder.is_dir()]
