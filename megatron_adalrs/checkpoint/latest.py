"""`latest`, the file that names the newest checkpoint of a run, and the checkpoints that lead to it.

After a rollback to an older checkpoint, newer ones are not part of the run any more: `abandon_newer` moves
them to a folder of their own. Until that is done, as after a kill, `latest` tells them apart.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from megatron_adalrs.checkpoint.manifest import LATEST, read_manifest, step_of
from megatron_adalrs.checkpoint.retention import checkpoints_in
from megatron_adalrs.utils.atomic_files import atomic_write, fsync_folder

ABANDONED = "abandoned_"
"""Beginning of the names of folders in SAVE with the checkpoints that rollbacks have set aside."""
HIGHEST_COUNTS = "the checkpoint with the highest step is taken for the latest one"
log = logging.getLogger(__name__)


def write_latest(save: Path, name: str) -> None:
    """Write the name of the newest checkpoint, which need not exist yet."""
    with atomic_write(save / LATEST) as file:
        file.write(f"{name}\n".encode())
    fsync_folder(save)


def read_latest(save: Path) -> str | None:
    """Return the name of the newest checkpoint; None if `latest` is missing or damaged, which is logged."""
    try:
        name = (save / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read (%s): %s", save / LATEST, error, HIGHEST_COUNTS)
        return None
    if name.startswith("iter_") and name.removeprefix("iter_").isdecimal():
        return name
    log.warning("%s contains %.40r, no name of a checkpoint: %s", save / LATEST, name, HIGHEST_COUNTS)
    return None


def current_checkpoints(save: Path) -> list[Path]:
    """Return the checkpoints up to the one that `latest` names, oldest first.

    `latest` may name a checkpoint that a kill has prevented from being completed. Without `latest`, as in a
    folder that was copied without it, all checkpoints are returned.
    """
    found, latest = checkpoints_in(save), read_latest(save)
    if latest is None:
        return found
    return [path for path in found if step_of(path) <= step_of(save / latest)]


def abandon_newer(save: Path, checkpoint: Path) -> list[Path]:
    """Make a run's checkpoint the latest one, and set those that were saved after it aside.

    Args:
        save: Folder of the run's checkpoints.
        checkpoint: Checkpoint that the run resumes from: in `save`, among those set aside before, which is
            moved back, or a copy elsewhere, which may have another name.

    Returns:
        New places of the checkpoints that are set aside, oldest first.
    """
    step, is_here = read_manifest(checkpoint)["step"], checkpoint.resolve().parent == save.resolve()
    first = step + 1 if is_here else step
    newer = [path for path in checkpoints_in(save) if step_of(path) >= first]
    save.mkdir(parents=True, exist_ok=True)
    write_latest(save, f"iter_{step:07d}")
    moved = []
    if newer:
        aside = _new_folder(save)
        for path in newer:
            moved.append(aside / f"iter_{step_of(path):07d}")
            os.replace(path, moved[-1])
        fsync_folder(aside)
    if checkpoint.resolve().parent.name.startswith(ABANDONED) and (
        checkpoint.resolve().parent.parent == save.resolve()
    ):
        os.replace(checkpoint, save / f"iter_{step:07d}")
    fsync_folder(save)
    return moved


def _new_folder(save: Path) -> Path:
    numbers = [path.name.removeprefix(ABANDONED) for path in save.glob(f"{ABANDONED}*")]
    number = 1 + max((int(text) for text in numbers if text.isdecimal()), default=0)
    folder = save / f"{ABANDONED}{number:04d}"
    folder.mkdir()
    return folder
