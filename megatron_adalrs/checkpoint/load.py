"""Finding the checkpoint to resume from, and loading it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megatron_adalrs.checkpoint.manifest import ENGINE, MANIFEST, STATE, find_damage, random_name, read_json
from megatron_adalrs.config import RunConfig
from megatron_adalrs.engine import Engine
from megatron_adalrs.parallel.collectives import on_every_rank
from megatron_adalrs.parallel.topology import Grid
from megatron_adalrs.random_state import set_random_state

log = logging.getLogger(__name__)


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders that are named like published checkpoints, oldest first."""
    named = (path for path in folder.glob("iter_*") if path.name.removeprefix("iter_").isdecimal())
    return sorted(named, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a published checkpoint."""
    return int(checkpoint.name.removeprefix("iter_"))


def has_checkpoint(load: Path) -> bool:
    """Whether there is anything, complete or not, that `find_checkpoint` would look at."""
    return any(checkpoints_in(folder) for folder in _folders(load))


def find_checkpoint(load: Path, strict: bool = False, verify: bool = False, flag: str = "--load") -> Path:
    """The checkpoint that `--load` means: `load` itself, or the newest complete one in it or in its `checkpoints`.

    Args:
        strict: refuse a damaged newest one, instead of passing over it with a warning.
        verify: compare hashes, and not presence and sizes alone.
        flag: what `load` was given with, for messages.

    Raises:
        ValueError: there is none; damaged ones are named.
    """
    if (load / STATE).exists() or (load / MANIFEST).exists():
        if damage := find_damage(load, verify):
            raise ValueError(f"{flag}: {load} is damaged: {damage}")
        return load
    candidates = sorted((path for folder in _folders(load) for path in checkpoints_in(folder)), key=step_of)
    damaged: list[str] = []
    for candidate in reversed(candidates):
        damage = find_damage(candidate, verify)
        if damage is None:
            for text in damaged:
                log.warning("passing over a damaged checkpoint: %s", text)
            return candidate
        damaged.append(f"{candidate}: {damage}")
        if strict:
            raise ValueError(
                f"{flag}: the newest checkpoint is damaged: {damaged[0]}; without --strict-load an older one is taken"
            )
    found = f"; damaged: {'; '.join(damaged)}" if damaged else ""
    raise ValueError(f"{flag}: no checkpoint in {load}: expected {load}/iter_NNNNNNN with its {MANIFEST}{found}")


def checkpoint_to_resume(run: RunConfig) -> Path | None:
    """The checkpoint that `--load` or `--auto-resume` means; None to start afresh.

    Raises:
        ValueError: there is none that can be loaded, although one is asked for, or one was there.
    """
    load = run.load or (run.save if run.auto_resume and has_checkpoint(run.save) else None)
    return find_checkpoint(load, run.strict_load, run.verify_checkpoint) if load else None


def read_state(checkpoint: Path, flag: str = "--load") -> dict[str, Any]:
    """What `save_checkpoint` was given, plus `world_size`.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return read_json(checkpoint / STATE)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag}: cannot read {checkpoint / STATE}: {error}") from None


def load_checkpoint(engine: Engine, grid: Grid, checkpoint: Path) -> None:
    """Load a checkpoint's tensors and random streams into an engine that has not stepped yet. Collective."""
    engine.load(checkpoint / ENGINE)
    set_random_state(on_every_rank(lambda: read_json(checkpoint / random_name(grid.rank))))


def _folders(load: Path) -> list[Path]:
    return [folder for folder in (load, load / "checkpoints") if folder.is_dir()]
