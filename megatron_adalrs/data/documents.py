"""Reading a corpus: a JSON-lines file, or a folder of text files, in batches that workers decode."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Batch:
    """Neighbouring documents, not yet decoded: a few lines of a JSON-lines file, or a few files of a folder.

    `input_bytes`: how far this batch advances in the input, whose size is `documents_size`.
    """

    source: Path
    input_bytes: int
    lines: tuple[bytes, ...] = ()
    first_line: int = 1
    files: tuple[Path, ...] = ()

    def read(self, json_key: str) -> Iterator[str]:
        """The text of each document; blank lines are none.

        Raises ValueError naming FILE:LINE, or FILE, for text that is not UTF-8, malformed JSON, a line that
        is not an object, and a key that is missing or not a string.
        """
        for number, line in enumerate(self.lines, start=self.first_line):
            if line.strip():
                yield _text_of_line(f"{self.source}:{number}", line, json_key)
        for path in self.files:
            yield _decode(str(path), path.read_bytes())


def read_batches(source: Path, file_glob: str) -> Iterator[Batch]:
    """The batches of a .jsonl or .json file (one object a line; .gz too) or of the files in a folder that
    match `file_glob`, in a fixed order: lines as they come, files by their relative POSIX path.

    Raises FileNotFoundError if the source is missing or nothing matches, ValueError if it is of another kind,
    holds no bytes, or is a damaged archive.
    """
    if documents_size(source, file_glob) == 0:
        raise ValueError(f"input {source} is empty: required at least one document")
    return _file_batches(source, file_glob) if source.is_dir() else _line_batches(source)


def read_documents(source: Path, json_key: str, file_glob: str) -> Iterator[str]:
    """The text of every document of a source; errors as in `read_batches` and `Batch.read`."""
    for batch in read_batches(source, file_glob):
        yield from batch.read(json_key)


def documents_size(source: Path, file_glob: str) -> int:
    """Bytes of the source as stored (compressed, if it is); errors as in `read_batches`."""
    if source.is_dir():
        return sum(path.stat().st_size for path in _matching_files(source, file_glob))
    if not source.exists():
        raise FileNotFoundError(f"input {source}: there is no such file or folder")
    if not source.name.endswith(_JSON_SUFFIXES):
        raise ValueError(f"input {source}: required a folder or a file named *{', *'.join(_JSON_SUFFIXES)}")
    return source.stat().st_size


def _matching_files(folder: Path, file_glob: str) -> list[Path]:
    try:
        files = [path for path in folder.glob(file_glob) if path.is_file()]
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"file glob {file_glob!r}: required a relative pattern: {error}") from error
    if not files:
        raise FileNotFoundError(f"input {folder}: no file matches {file_glob!r}")
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _file_batches(folder: Path, file_glob: str) -> Iterator[Batch]:
    files: list[Path] = []
    size = 0
    for path in _matching_files(folder, file_glob):
        files.append(path)
        size += path.stat().st_size
        if size >= _BATCH_BYTES:
            yield Batch(folder, size, files=tuple(files))
            files, size = [], 0
    if files:
        yield Batch(folder, size, files=tuple(files))


def _line_batches(source: Path) -> Iterator[Batch]:
    with source.open("rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if source.suffix == ".gz" else raw
        position, first_line = 0, 1
        try:
            while lines := stream.readlines(_BATCH_BYTES):
                yield Batch(source, raw.tell() - position, tuple(lines), first_line)
                position, first_line = raw.tell(), first_line + len(lines)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"input {source} is not a whole gzip file: {error}") from error


def _text_of_line(origin: str, line: bytes, json_key: str) -> str:
    text = _decode(origin, line)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number with too many digits
        raise ValueError(f"{origin}: malformed JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{origin}: required a JSON object, found {type(record).__name__}")
    if json_key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"{origin}: there is no key {json_key!r}; keys found: {keys}")
    value = record[json_key]
    if not isinstance(value, str):
        raise ValueError(f"{origin}: key {json_key!r} is {type(value).__name__}: required a string")
    return _require_encodable(origin, value)


def _decode(origin: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{origin}: not UTF-8: {error.reason} at byte {error.start}") from error


def _require_encodable(origin: str, text: str) -> str:
    """JSON can spell half a surrogate pair, which is no character and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{origin}: unpaired surrogate at character {error.start}: required valid text") from error
    return text
