"""Retention of checkpoints: `--keep-last`, `--save-retain-interval`, and leftovers of killed processes."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from megatron_adalrs.checkpoint.manifest import find_damage, published_path, step_of

INCOMPLETE, REMOVED, REPLACED = "incomplete", "removed", "replaced"
"""Endings of the hidden folders `.iter_NNNNNNN.ENDING`, which are not complete checkpoints of their step."""


@dataclass(frozen=True)
class CheckpointFolder:
    """Folder that checkpoints are saved in, and how many of them are kept."""

    save: Path
    keep_last: int | None = None
    """Number of complete checkpoints to keep; None keeps all."""
    retain_interval: int | None = None
    """Checkpoints whose step is a multiple of this are never removed."""


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the folders named like published checkpoints, oldest first.

    A checkpoint that was set aside to be replaced counts if a kill prevented its replacement.
    """
    named = [path for path in folder.glob("iter_*") if path.name.removeprefix("iter_").isdecimal()]
    aside = [path for path in folder.glob(f".iter_*.{REPLACED}") if not published_path(path).exists()]
    return sorted([*named, *aside], key=step_of)


def remove_old_checkpoints(folder: CheckpointFolder, written: Path) -> None:
    """Remove the complete checkpoints before `written`, but the newest `keep_last` and retained ones.

    Neither the checkpoint that was just written nor one of a later step is removed. A damaged checkpoint is
    not removed and does not count.
    """
    if folder.keep_last is None:
        return
    older = [path for path in checkpoints_in(folder.save) if step_of(path) < step_of(written)]
    complete = [*(path for path in older if find_damage(path) is None), written]
    for path in complete[: -folder.keep_last]:
        if folder.retain_interval is None or step_of(path) % folder.retain_interval:
            # Rename first, so that a partly removed folder is not taken for a checkpoint.
            removed = hidden_path(path, REMOVED)
            os.replace(path, removed)
            shutil.rmtree(removed, ignore_errors=True)


def clean_up(save: Path) -> None:
    """Remove what killed processes left, and restore a checkpoint that was set aside and never replaced."""
    for aside in save.glob(f".iter_*.{REPLACED}"):
        if not published_path(aside).exists():
            os.replace(aside, published_path(aside))
    for leftover in chain(*(save.glob(f".iter_*.{end}") for end in (INCOMPLETE, REMOVED, REPLACED))):
        shutil.rmtree(leftover, ignore_errors=True)


def hidden_path(checkpoint: Path, ending: str) -> Path:
    """Return the hidden name of a checkpoint that is being written, removed or replaced."""
    return checkpoint.with_name(f".{checkpoint.name}.{ending}")
