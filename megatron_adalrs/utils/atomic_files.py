"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def temporary_beside(path: Path) -> Path:
    """A name that nobody else uses, in the folder of `path` so that `os.replace` stays on one file system."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def publish(stream: BinaryIO, temporary: Path, path: Path) -> None:
    """Bring a finished temporary file to disk, close it, and give it its final name."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
    os.replace(temporary, path)


@contextmanager
def atomic_write(path: Path | str) -> Iterator[BinaryIO]:
    """A binary stream that becomes `path` if the block ends well and leaves nothing behind if not.

    The folder is created if needed. Raises OSError where it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    stream = temporary.open("xb")
    try:
        yield stream
        publish(stream, temporary, path)
    finally:
        stream.close()
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` by one rename if the block ends well and leaves nothing behind
    if not.

    Raises:
        ValueError: there is something at `path` already, other than an empty folder.
        OSError: it cannot be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} is there already and is not an empty folder: nothing is overwritten")
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = temporary_beside(path)
    draft.mkdir()
    try:
        yield draft
        for file in (file for file in draft.rglob("*") if file.is_file()):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        os.replace(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
