"""Writer and reader of JSON-lines files, such as metrics.jsonl and decisions.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from megatron_adalrs.metrics.sinks import Record
from megatron_adalrs.utils.atomic_files import AtomicAppend

Line = TypeVar("Line")


class JsonLines:
    """Sink that appends one JSON object per line, without a buffer: written records survive a kill.

    Args:
        path: File to append to. An unfinished last line, left by a kill, is removed.
        kinds: Kinds of records to write.
    """

    def __init__(self, path: Path, kinds: frozenset[str]) -> None:
        self.name = str(path)
        self._kinds = kinds
        _remove_unfinished_line(path)
        self._file = AtomicAppend(path)

    def write(self, kind: str, record: Record) -> None:
        if kind in self._kinds:
            self._file.write((json.dumps(record) + "\n").encode())

    def close(self) -> None:
        self._file.close()


def _remove_unfinished_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def read_records(file: Path, adapter: TypeAdapter[Line]) -> Iterator[Line]:
    """Yield the records of a JSON-lines file in order.

    A last line that is not a complete JSON value is left out: the process was killed while writing it.

    Raises:
        ValueError: If any other line is not valid JSON, lacks a field or has one of the wrong type. The
            message names file, line and field.
    """
    with file.open("rb") as lines:
        torn: str | None = None
        for number, line in enumerate(lines, start=1):
            if torn is not None:
                raise ValueError(torn)
            try:
                yield adapter.validate_json(line, strict=True)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                field = f"{first['loc'][-1]}: " if first["loc"] else ""
                complaint = f"{file}:{number}: {field}{first['msg']}"
                if first["type"] != "json_invalid":
                    raise ValueError(complaint) from None
                torn = complaint
