"""A file that grows by whole pieces only, whatever the disk does."""

from __future__ import annotations

import os
from pathlib import Path


class AtomicAppend:
    """A file opened for appending, unbuffered: a piece is in it whole, or not at all.

    What was written survives the death of the process at once. Where a piece does not fit, as on a full disk,
    what was written of it is taken away again, so that the next begins where a reader expects it.

    Raises:
        OSError: the file cannot be opened; from `write`, it cannot take the piece.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, piece: bytes) -> None:
        size = os.fstat(self._descriptor).st_size
        left = memoryview(piece)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        os.close(self._descriptor)
