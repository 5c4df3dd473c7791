"""Writing and publishing a checkpoint, and removing those that are no longer wanted."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_adalrs.checkpoint.load import checkpoints_in
from megatron_adalrs.checkpoint.manifest import (
    ENGINE,
    LATEST,
    STATE,
    find_damage,
    fsync_and_hash,
    published_path,
    random_name,
    step_of,
    write_json,
    write_manifest,
)
from megatron_adalrs.distributed.collectives import (
    from_every_rank,
    gather_numbers,
    on_every_rank,
    on_first_rank,
)
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine import Engine
from megatron_adalrs.snapshot.rng_state import random_state

SPARE = 1.05
"""Room that must be there for a checkpoint, in sizes of the last one."""


@dataclass(frozen=True)
class CheckpointFolder:
    """Where checkpoints go, and which stay."""

    save: Path
    keep_last: int | None = None
    """Complete ones to keep; None: all of them."""
    retain_interval: int | None = None
    """Those of steps that it divides are kept for good."""


class PendingSave:
    """A checkpoint under way: the draft, written by `engine.files`, and then its publication. Every call is
    collective.

    Args:
        state: plain JSON values; `read_state` hands them back.
        in_background: only copy what is saved, and have it written beside the training.

    Raises:
        ValueError: on every rank, if it cannot be written; the previous checkpoints are untouched.
    """

    def __init__(
        self,
        engine: Engine,
        mesh: ProcessMesh,
        places: CheckpointFolder,
        step: int,
        state: dict[str, Any],
        in_background: bool = False,
    ) -> None:
        self.step = step
        self._engine, self._mesh, self._places = engine, mesh, places
        name = f"iter_{step:07d}"
        self._target, self._draft = places.save / name, places.save / f".{name}.incomplete"
        on_first_rank(lambda: _begin(places.save, self._draft))
        engine.save(self._draft / ENGINE, fsync_and_hash if in_background else None)
        try:
            on_every_rank(lambda: write_json(self._draft / random_name(mesh.rank), random_state()))
            on_first_rank(lambda: write_json(self._draft / STATE, state | {"world_size": mesh.world_size}))
        except ValueError:
            engine.files.abandon()
            raise

    @property
    def is_written(self) -> bool:
        """Whether no rank writes any more."""
        engine = self._engine
        return not gather_numbers([engine.files.is_writing], engine.device).any()

    def publish(self) -> Path:
        """Wait for what is being written; make it a checkpoint; then remove old ones.

        Raises:
            ValueError: on every rank, if it cannot be written or published.
        """
        written = from_every_rank(self._engine.files.finish)
        known = {
            str(path.relative_to(self._draft)): digest for part in written for path, digest in part.items()
        }
        files = on_first_rank(lambda: sorted(set(_files_in(self._draft)) - known.keys()))
        # Each rank brings a share of the rest to disk and hashes it, whoever wrote it.
        mine = files[self._mesh.rank :: self._mesh.world_size]
        shares = from_every_rank(lambda: {name: fsync_and_hash(self._draft / name) for name in mine})
        hashes = known | {name: digest for share in shares for name, digest in share.items()}
        facts = {"step": self.step, "mesh": vars(self._mesh.shape)}
        places = self._places
        on_first_rank(lambda: _publish(self._draft, self._target, places.save / LATEST, hashes, facts))
        if places.keep_last is not None:
            on_first_rank(
                lambda: remove_old_checkpoints(places.save, places.keep_last, places.retain_interval)
            )
        return self._target


def save_checkpoint(
    engine: Engine, mesh: ProcessMesh, places: CheckpointFolder, step: int, state: dict[str, Any]
) -> Path:
    """Write and publish a checkpoint before training goes on: see `PendingSave`."""
    return PendingSave(engine, mesh, places, step, state).publish()


def remove_old_checkpoints(save: Path, keep_last: int, retain_interval: int | None) -> None:
    """Remove complete checkpoints but the newest `keep_last`, and those of steps that `retain_interval`
    divides.

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
    for aside in save.glob(".iter_*.replaced"):
        if not published_path(aside).exists():
            os.replace(aside, published_path(aside))
    for leftover in chain(*(save.glob(f".iter_*.{end}") for end in ("incomplete", "removed", "replaced"))):
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir(parents=True)
    previous = checkpoints_in(save)
    if previous:
        needed = int(SPARE * sum(path.stat().st_size for path in previous[-1].rglob("*") if path.is_file()))
        free = shutil.disk_usage(save).free
        if free < needed:
            draft.rmdir()
            raise OSError(f"{save} has {free} bytes free, and a checkpoint takes about {needed}")


def _files_in(draft: Path) -> list[str]:
    return [str(path.relative_to(draft)) for path in draft.rglob("*") if path.is_file()]


def _publish(draft: Path, target: Path, latest: Path, hashes: dict[str, str], facts: dict[str, Any]) -> None:
    write_manifest(draft, hashes, facts)
    for folder in {draft, *(path for path in draft.rglob("*") if path.is_dir())}:
        _sync_folder(folder)
    if target.exists():
        # One of this step is there already, saved by an earlier process: it is found under its other name,
        # too.
        replaced = target.with_name(f".{target.name}.replaced")
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
