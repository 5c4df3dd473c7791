"""Records as a file of JSON objects."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_adalrs.metrics.atomic_append import AtomicAppend
from megatron_adalrs.metrics.sinks import Record


class JsonLines:
    """One file, one JSON object a line, in the file at once: what was written survives a kill."""

    def __init__(self, path: Path, kinds: frozenset[str]) -> None:
        self.name = str(path)
        self._kinds = kinds
        _cut_torn_line(path)
        self._file = AtomicAppend(path)

    def write(self, kind: str, record: Record) -> None:
        if kind in self._kinds:
            self._file.write((json.dumps(record) + "\n").encode())

    def close(self) -> None:
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    """Drop an unfinished last line that a kill left behind, so that what follows begins on a line of its
    own."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
