"""Identity of a run, which is stored in each of its folders and in its checkpoints."""

from __future__ import annotations

import json
import os
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_adalrs.utils.atomic_files import atomic_write

RUN_FILE = "run.json"
ARTIFACTS = (RUN_FILE, "metrics.jsonl", "decisions.jsonl", "config.yaml", "iter_*", "events.out.tfevents*")
"""Patterns of the files and folders that only a run writes."""


@dataclass(frozen=True)
class RunIdentity:
    """Identity of a run, the same in all of its processes, folders and checkpoints."""

    id: str
    started: str
    """Time at which the run was started for the first time."""
    parent: str | None = None
    """Checkpoint of another run that this run continues in a run directory of its own."""
    rolled_back_to: str | None = None
    """Own checkpoint that `--load` last named: a requeued job with the same flags does not go back again."""

    @classmethod
    def new(cls, parent: Path | None = None) -> RunIdentity:
        """Return the identity of a new run."""
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        return cls(uuid.uuid4().hex[:16], started, str(parent.resolve()) if parent else None)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunIdentity:
        """Return the identity in the content of a run.json; further entries are left out.

        Raises:
            ValueError: An entry is missing or has the wrong type.
        """
        found = {name: values.get(name) for name in cls.__dataclass_fields__}
        for name, value in found.items():
            if type(value) is not str and not (value is None and name in ("parent", "rolled_back_to")):
                raise ValueError(f"{name} must be a string, not {value!r:.40}")
        return cls(**found)  # type: ignore[arg-type]  # checked above

    def to_json(self) -> dict[str, Any]:
        """Return plain values, which `from_json` accepts."""
        return asdict(self)

    def at_checkpoint(self, name: str) -> RunIdentity:
        """Return this identity after a rollback to a checkpoint of the run."""
        return replace(self, rolled_back_to=name)


def read_run_file(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's run.json, or None if there is none.

    Raises:
        ValueError: It cannot be read, or is not valid.
    """
    file = folder / RUN_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("required an object")
        RunIdentity.from_json(content)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    return content


def write_run_file(folder: Path, content: dict[str, Any]) -> None:
    """Write a folder's run.json."""
    with atomic_write(folder / RUN_FILE) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def find_artifact(folder: Path) -> Path | None:
    """Return a file or folder that a run has written in a folder, or None."""
    return next((path for pattern in ARTIFACTS for path in sorted(folder.glob(pattern))), None)


def find_run_directory(path: Path) -> Path | None:
    """Return the run directory that a run directory, checkpoint folder or checkpoint belongs to.

    Args:
        path: A run directory, its folder of checkpoints, `latest` in it, or one checkpoint.

    Returns:
        None if it belongs to no run directory that still exists.

    Raises:
        ValueError: A run.json cannot be read.
    """
    start = path if path.is_absolute() or path.name not in ("", "..") else path.absolute()
    for folder in (start, start.parent, start.parent.parent):
        content = read_run_file(folder)
        if content is None:
            continue
        if (relative := content.get("run_dir")) is None:
            return folder
        run_dir = Path(os.path.normpath(folder / relative))
        owner = read_run_file(run_dir)
        return run_dir if owner and owner["id"] == content["id"] else None
    return None
