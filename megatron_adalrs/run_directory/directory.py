"""A run directory that this process has opened to write to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from megatron_adalrs.config.run import RUN_CONFIG
from megatron_adalrs.run_directory.folders import RunFolders, missing_folders, remove_empty, require_writable
from megatron_adalrs.run_directory.identity import (
    RUN_FILE,
    RunIdentity,
    find_artifact,
    read_run_file,
    write_run_file,
)
from megatron_adalrs.run_directory.lock import RunLock
from megatron_adalrs.utils.atomic_files import atomic_write

DEFAULT_PLACES = {field: str(path) for field, path in RunFolders.inside(Path())._asdict().items()}


class RunDirectory:
    """A locked run directory.

    Until `claim`, no file of the run is written, so that a run which is refused leaves nothing behind.

    Args:
        folders: Folders of the run.

    Raises:
        ValueError: A folder cannot be written, or another process uses the run directory.
    """

    def __init__(self, folders: RunFolders) -> None:
        self.folders = folders
        self._written: list[Path] = []
        self._created: list[Path] = []
        for field, folder in folders.by_field():
            require_writable(folder, field)
        self._lock = RunLock(folders.run_dir)

    @property
    def identity(self) -> RunIdentity | None:
        """Identity of the run in the run directory; None if there is none.

        Raises:
            ValueError: run.json cannot be read.
        """
        content = read_run_file(self.folders.run_dir)
        return RunIdentity.from_json(content) if content else None

    def require_new(self) -> None:
        """Check that no folder contains files of a run.

        Raises:
            ValueError: One does; the message names its field and what can be done.
        """
        for field, folder in self.folders.by_field():
            self._require_free(field, folder)

    def claim(self, identity: RunIdentity, checkpoint: Path | None = None) -> None:
        """Write the run's identity into each of its folders.

        Args:
            checkpoint: Checkpoint of this run that it resumes from. It shows that a folder without identity,
                whose run.json has been removed, is the run's.

        Raises:
            ValueError: A folder contains files of another run.
            OSError: A folder cannot be written.
        """
        own = self.identity
        continues = checkpoint is not None or (own is not None and own.id == identity.id)
        for field, folder in self.folders.by_field():
            content = read_run_file(folder)
            if content is None or content["id"] != identity.id:
                if content is not None or not (continues and self._is_inside(folder, checkpoint)):
                    self._require_free(field, folder)
                self._created += missing_folders(folder)
                folder.mkdir(parents=True, exist_ok=True)
                self._written.append(folder / RUN_FILE)
            write_run_file(folder, identity.to_json() | self._places(folder))

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Write the run's configuration, which `--config` accepts."""
        path = self.folders.run_dir / RUN_CONFIG
        if not path.exists():
            self._written.append(path)
        with atomic_write(path) as file:
            file.write(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).encode())

    def withdraw(self) -> None:
        """Remove what this process has written for a run that could not begin, and release."""
        for path in self._written:
            with suppress(OSError):
                path.unlink()
        remove_empty(self._created)
        self.release()

    def release(self) -> None:
        """Let other processes use the run directory."""
        self._lock.release()

    def _places(self, folder: Path) -> dict[str, str]:
        """Return where the other folders of the run are, relative to one of them.

        The run directory names those that are not inside it, the others name the run directory.
        """
        here, run_dir = folder.resolve(), self.folders.run_dir.resolve()
        if here != run_dir:
            return {"run_dir": os.path.relpath(run_dir, here)}
        places = {field: os.path.relpath(one.resolve(), here) for field, one in self.folders.by_field()}
        return {field: place for field, place in places.items() if place != DEFAULT_PLACES[field]}

    def _is_inside(self, folder: Path, checkpoint: Path | None) -> bool:
        """Return whether a folder is in the run directory, or contains a checkpoint of the run."""
        here = folder.resolve()
        return here.is_relative_to(self.folders.run_dir.resolve()) or (
            checkpoint is not None and checkpoint.resolve().parent == here
        )

    def _require_free(self, field: str, folder: Path) -> None:
        artifact = find_artifact(folder)
        if artifact is None:
            return
        if artifact.name == RUN_FILE:
            content = read_run_file(folder) or {}
            place = content.get("run_dir")
            run = f"the run of {os.path.normpath(folder / place)}" if place else "a run"
            holds = f"already holds {run}, started at {content.get('started')}"
        else:
            holds = f"already holds {artifact.name} of another run"
        remedy = (
            f", or resume that run with --load {folder}, or with --auto-resume" if field == "run_dir" else ""
        )
        raise ValueError(f"{field}: {folder} {holds}; choose another folder{remedy}")
