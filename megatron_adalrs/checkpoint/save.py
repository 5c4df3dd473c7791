"""Writing and publishing a checkpoint, and removing those that are no longer wanted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_adalrs.checkpoint.load import checkpoints_in, step_of
from megatron_adalrs.checkpoint.manifest import (
    ENGINE,
    LATEST,
    STATE,
    find_damage,
    random_name,
    sha256,
    write_json,
    write_manifest,
)
from megatron_adalrs.engine import Engine
from megatron_adalrs.parallel.collectives import from_every_rank, on_every_rank, on_first_rank
from megatron_adalrs.parallel.topology import Grid
from megatron_adalrs.random_state import random_state

SPARE = 1.05
"""Room that must be there for a checkpoint, in sizes of the last one."""


def save_checkpoint(
    engine: Engine,
    grid: Grid,
    save: Path,
    step: int,
    state: dict[str, Any],
    keep_last: int | None = None,
    retain_interval: int | None = None,
) -> Path:
    """Publish a checkpoint under `save`; then remove old ones. Collective.

    Args:
        state: plain JSON values; `read_state` hands them back.
        keep_last: complete checkpoints to keep; None: all of them.
        retain_interval: those of steps that it divides are kept for good.

    Raises:
        ValueError: on every rank, if it cannot be written; the previous checkpoints are untouched.
    """
    name = f"iter_{step:07d}"
    target, draft = save / name, save / f".{name}.incomplete"
    on_first_rank(lambda: _begin(save, draft))
    on_every_rank(lambda: engine.save(draft / ENGINE))
    on_every_rank(lambda: write_json(draft / random_name(grid.rank), random_state()))
    dist.barrier()
    state = state | {"world_size": grid.world_size}
    files = on_first_rank(lambda: _complete(draft, state))
    # Each rank brings a share of the files to disk and hashes it, whoever wrote them.
    shares = from_every_rank(lambda: {name: _secured(draft / name) for name in files[grid.rank :: grid.world_size]})
    hashes = {name: digest for share in shares for name, digest in share.items()}
    facts = {"step": step, "grid": vars(grid.shape)}
    on_first_rank(lambda: _publish(draft, target, save / LATEST, hashes, facts))
    if keep_last is not None:
        on_first_rank(lambda: remove_old(save, keep_last, retain_interval))
    return target


def remove_old(save: Path, keep_last: int, retain_interval: int | None) -> None:
    """Remove complete checkpoints but the newest `keep_last`, and those of steps that `retain_interval` divides.

    A damaged one is left where it is, and does not count.
    """
    complete = [path for path in checkpoints_in(save) if find_damage(path) is None]
    for path in complete[:-keep_last]:
        if retain_interval is None or step_of(path) % retain_interval:
            # Renamed first: what is half removed is no longer taken for a checkpoint.
            doomed = path.with_name(f".{path.name}.removed")
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _begin(save: Path, draft: Path) -> None:
    for leftover in [*save.glob(".iter_*.incomplete"), *save.glob(".iter_*.removed")]:
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir(parents=True)
    previous = checkpoints_in(save)
    if previous:
        needed = int(SPARE * sum(path.stat().st_size for path in previous[-1].rglob("*") if path.is_file()))
        free = shutil.disk_usage(save).free
        if free < needed:
            draft.rmdir()
            raise OSError(f"{save} has {free} bytes free, and a checkpoint takes about {needed}")


def _complete(draft: Path, state: dict[str, Any]) -> list[str]:
    write_json(draft / STATE, state)
    return sorted(str(path.relative_to(draft)) for path in draft.rglob("*") if path.is_file())


def _secured(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def _publish(draft: Path, target: Path, latest: Path, hashes: dict[str, str], facts: dict[str, Any]) -> None:
    write_manifest(draft, hashes, facts)
    for folder in {draft, *(path for path in draft.rglob("*") if path.is_dir())}:
        _sync_folder(folder)
    if target.exists():
        # One of this step is there already, saved by an earlier process: it stays until this one takes its place.
        replaced = target.with_name(f".{target.name}.removed")
        os.replace(target, replaced)
        os.replace(draft, target)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.replace(draft, target)
    temporary = latest.with_name(".latest.incomplete")
    temporary.write_text(target.name + "\n", encoding="utf-8")
    os.replace(temporary, latest)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
