"""Folders that a run writes to, and the check that they can be written."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from megatron_adalrs.config import RunConfig
from megatron_adalrs.run_directory.identity import find_run_directory


class RunFolders(NamedTuple):
    """Folders of a run: those that were given, and the defaults of the others."""

    run_dir: Path
    save: Path
    tensorboard_dir: Path

    @classmethod
    def of(cls, run: RunConfig) -> RunFolders:
        """Return the folders of a run. Without `run_dir`, a loaded run is continued where it is."""
        run_dir = run.run_dir or (run.load and find_run_directory(run.load))
        default = cls.inside(run_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S"))
        return cls(default.run_dir, run.save or default.save, run.tensorboard_dir or default.tensorboard_dir)

    @classmethod
    def inside(cls, run_dir: Path) -> RunFolders:
        """Return the default folders of a run directory."""
        return cls(run_dir, run_dir / "checkpoints", run_dir / "tensorboard")

    def by_field(self) -> Iterator[tuple[str, Path]]:
        """Yield each folder with the name of its field, and a folder of two fields once."""
        seen = set()
        for field, folder in self._asdict().items():
            if folder.resolve() not in seen:
                seen.add(folder.resolve())
                yield field, folder


def require_writable(folder: Path, field: str) -> None:
    """Check that files can be created in a folder, and remove what did not exist before.

    Raises:
        ValueError: They cannot; the message begins with `field`.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{field}: {folder} is not a folder")
    created = missing_folders(folder)
    probe = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")  # a byte, because an empty file can be created on a full disk
    except OSError as error:
        raise ValueError(f"{field}: cannot write to {folder}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            probe.unlink()
        remove_empty(created)


def missing_folders(folder: Path) -> list[Path]:
    """Return the folder and its parents that do not exist, innermost first."""
    return [one for one in (folder, *folder.parents) if not os.path.lexists(one)]


def remove_empty(folders: list[Path]) -> None:
    """Remove the folders that are empty, in this order; another run may use one of them by now."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
