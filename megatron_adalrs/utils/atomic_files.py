"""Files and folders that are written completely or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def temporary_beside(path: Path) -> Path:
    """Return an unused name in the folder of `path`, so that `os.replace` stays on one file system."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def publish(stream: BinaryIO, temporary: Path, path: Path) -> None:
    """Flush a finished temporary file to disk, close it, and rename it to its final name."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
    os.replace(temporary, path)


def fsync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path | str) -> Iterator[BinaryIO]:
    """Open a binary stream that becomes `path` when the block succeeds, and is removed when it fails.

    The folder is created if needed.

    Raises:
        OSError: If the file cannot be written.
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
    """Make a folder that is renamed to `path` when the block succeeds, and is removed when it fails.

    Raises:
        ValueError: If `path` exists and is not an empty folder.
        OSError: If the folder cannot be written.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder: nothing is overwritten")
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


class AtomicAppend:
    """A file opened for appending, without a buffer, in which a piece is written completely or not at all.

    Written pieces survive the death of the process. If a piece does not fit, as on a full disk, its written
    part is removed again, so that the next piece begins where a reader expects it.

    Raises:
        OSError: If the file cannot be opened, or, from `write`, if the piece cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, piece: bytes) -> None:
        """Append a piece."""
        size = os.fstat(self._descriptor).st_size
        left = memoryview(piece)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise

    def flush(self) -> None:
        """Do nothing: there is no buffer."""

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
