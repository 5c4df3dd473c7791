"""Write a checkpoint under a temporary name and publish it once it is complete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from megatron_adalrs.checkpoint.disk_space import REQUIRED_SPACE, last_size
from megatron_adalrs.checkpoint.latest import write_latest
from megatron_adalrs.checkpoint.manifest import (
    ENGINE,
    STATE,
    fsync_and_hash,
    random_name,
    write_json,
    write_manifest,
)
from megatron_adalrs.checkpoint.retention import (
    INCOMPLETE,
    REPLACED,
    CheckpointFolder,
    clean_up,
    hidden_path,
    remove_old_checkpoints,
)
from megatron_adalrs.distributed.collectives import (
    from_every_rank,
    gather_numbers,
    on_every_rank,
    on_first_rank,
)
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine import Engine
from megatron_adalrs.snapshot.rng_state import RngState
from megatron_adalrs.utils.atomic_files import fsync_folder


class PendingSave:
    """A checkpoint that is being written and is not published yet. All methods are collective.

    Args:
        state: Plain JSON values; `read_state` returns them.
        in_background: Copy the tensors and return; threads write the copies while training continues.

    Raises:
        ValueError: On every rank, if the checkpoint cannot be written; the previous ones are untouched.
    """

    def __init__(
        self,
        engine: Engine,
        mesh: ProcessMesh,
        folder: CheckpointFolder,
        step: int,
        state: dict[str, Any],
        in_background: bool = False,
    ) -> None:
        self.step = step
        self._engine = engine
        self._mesh = mesh
        self._folder = folder
        self._target = folder.save / f"iter_{step:07d}"
        self._draft = hidden_path(self._target, INCOMPLETE)
        on_first_rank(lambda: _begin(folder.save, self._draft))
        engine.save(self._draft / ENGINE, fsync_and_hash if in_background else None)
        try:
            on_every_rank(
                lambda: write_json(self._draft / random_name(mesh.rank), RngState.capture().to_json())
            )
            on_first_rank(lambda: write_json(self._draft / STATE, state | {"world_size": mesh.world_size}))
        except ValueError:
            engine.files.abandon()
            raise

    @property
    def is_written(self) -> bool:
        """True if all ranks have written their files."""
        engine = self._engine
        return not gather_numbers([engine.files.is_writing], engine.device).any()

    def publish(self) -> Path:
        """Wait until the files are written, publish the checkpoint and remove old ones.

        Returns:
            Folder of the checkpoint.

        Raises:
            ValueError: On every rank, if the checkpoint cannot be written or published.
        """
        written = from_every_rank(self._engine.files.finish)
        known = {
            str(path.relative_to(self._draft)): digest for part in written for path, digest in part.items()
        }
        files = on_first_rank(lambda: sorted(set(_files_in(self._draft)) - known.keys()))
        # The remaining files are divided among the ranks, whichever rank wrote them.
        mine = files[self._mesh.rank :: self._mesh.world_size]
        shares = from_every_rank(lambda: {name: fsync_and_hash(self._draft / name) for name in mine})
        hashes = known | {name: digest for share in shares for name, digest in share.items()}
        facts = {"step": self.step, "mesh": vars(self._mesh.shape)}

        def publish() -> None:
            _publish(self._draft, self._target, hashes, facts)
            remove_old_checkpoints(self._folder, self._target)

        on_first_rank(publish)
        return self._target


def save_checkpoint(
    engine: Engine, mesh: ProcessMesh, folder: CheckpointFolder, step: int, state: dict[str, Any]
) -> Path:
    """Write and publish a checkpoint before training continues; see `PendingSave`."""
    return PendingSave(engine, mesh, folder, step, state).publish()


def _begin(save: Path, draft: Path) -> None:
    """Create the folder of a new checkpoint, if the disk has room for it.

    Raises:
        OSError: The disk has less free space than the previous checkpoint takes.
    """
    clean_up(save)
    draft.mkdir(parents=True)
    needed = int(REQUIRED_SPACE * last_size(save))
    free = shutil.disk_usage(save).free
    if free < needed:
        draft.rmdir()
        raise OSError(f"{save} has {free} bytes free, but a checkpoint needs about {needed}")


def _files_in(draft: Path) -> list[str]:
    return [str(path.relative_to(draft)) for path in draft.rglob("*") if path.is_file()]


def _publish(draft: Path, target: Path, hashes: dict[str, str], facts: dict[str, Any]) -> None:
    """Write the manifest, then rename the draft to its final name.

    `latest` is written before: if it were written afterwards, a kill in between would leave a complete
    checkpoint that `latest` excludes. A name in `latest` without a checkpoint stands for the one before it.
    """
    write_manifest(draft, hashes, facts)
    for folder in {draft, *(path for path in draft.rglob("*") if path.is_dir())}:
        fsync_folder(folder)
    write_latest(target.parent, target.name)
    if target.exists():
        # An earlier process saved this step. Until the new folder has its name, the old one is found under
        # the name that it is set aside with.
        replaced = hidden_path(target, REPLACED)
        os.replace(target, replaced)
        os.replace(draft, target)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.replace(draft, target)
    fsync_folder(target.parent)
