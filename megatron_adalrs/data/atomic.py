"""Files that appear whole or not at all."""

from __future__ import annotations

import os
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
