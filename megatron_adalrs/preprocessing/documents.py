"""Reader of a corpus: JSON lines, Parquet, or a folder of such files or texts, in batches for workers."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from megatron_adalrs.preprocessing.parquet import package, read_rows

_JSON_SUFFIXES = tuple(f".{kind}{archive}" for archive in ("", ".gz", ".zst") for kind in ("jsonl", "json"))
_PARQUET = ".parquet"
_SUFFIXES = (*_JSON_SUFFIXES, _PARQUET)
BATCH_BYTES = 1 << 18  # about 0.1 s of tokenizing, which is lost when a worker is stopped


@dataclass(frozen=True)
class Position:
    """A position between two batches of a corpus.

    Attributes:
        file: Number of the file in `find_files`.
        content_bytes: Uncompressed bytes of a JSON-lines file before the position.
        row_groups: Complete row groups of a Parquet file before the position.
        lines: Lines or rows of the file before the position.
        stored_bytes: Bytes of the file on disk before the position.
        checksum: CRC-32 of the content of a JSON-lines file before the position.
    """

    file: int = 0
    content_bytes: int = 0
    row_groups: int = 0
    lines: int = 0
    stored_bytes: int = 0
    checksum: int = 0


@dataclass(frozen=True)
class Batch:
    """Consecutive documents, not yet decoded: JSON lines, rows of a Parquet file, or text files.

    Attributes:
        source: File of the documents.
        end: Position after the batch.
        input_bytes: Bytes on disk that the batch covers; their sum over a corpus is `documents_size`.
        lines: Lines of a JSON-lines file.
        first_line: Number of the first line or row.
        files: Text files.
        rows: Rows of a Parquet file.
    """

    source: Path
    end: Position
    input_bytes: int
    lines: bytes = b""
    first_line: int = 1
    files: tuple[Path, ...] = ()
    rows: tuple[bytes | None, ...] = ()

    def read(self, json_key: str) -> Iterator[str]:
        """Yield the text of each document. Blank lines are skipped.

        A byte order mark at the beginning of a line or a text file is dropped.

        Raises:
            ValueError: If text is not UTF-8, JSON is malformed, a line is not an object, a key is missing or
                not a string, or a row is null. The message names FILE:LINE, FILE:ROW or FILE.
        """
        for number, line in enumerate(self.lines.split(b"\n"), start=self.first_line):
            # Concatenated files may each begin with a mark, which is then in later lines too.
            content = line.removeprefix(codecs.BOM_UTF8)
            if content.strip():
                yield _text_of_line(f"{self.source}:{number}", content, json_key)
        for path in self.files:
            yield _decode(str(path), path.read_bytes().removeprefix(codecs.BOM_UTF8))
        for number, row in enumerate(self.rows, start=self.first_line):
            if row is None:
                raise ValueError(f"{self.source}:{number}: column {json_key!r} is null: required a string")
            yield _decode(f"{self.source}:{number}", row)


def find_files(source: Path, file_glob: str) -> list[Path]:
    """Return the file itself, or the matching files of a folder, sorted by relative POSIX path.

    Raises:
        FileNotFoundError: If the source is missing or nothing matches.
        ValueError: If the source is a file of another kind, or what is found cannot be read as a file.
    """
    if source.is_dir():
        return _matching_files(source, file_glob)
    if not os.path.lexists(source):
        raise FileNotFoundError(f"input {source}: there is no such file or folder")
    _require_readable(source)
    if not source.name.endswith(_SUFFIXES):
        raise ValueError(f"input {source}: required a folder or a file named *{', *'.join(_SUFFIXES)}")
    return [source]


def documents_size(files: Sequence[Path]) -> int:
    """Return the total size of the files on disk in bytes."""
    return sum(path.stat().st_size for path in files)


def read_batches(
    source: Path, files: Sequence[Path], json_key: str, start: Position | None = None
) -> Iterator[Batch]:
    """Yield the batches of a corpus from `start` on, in a fixed order that does not depend on `start`.

    The name of a file selects how it is read: .jsonl and .json as one object per line, optionally compressed
    as .gz or .zst; .parquet by its column `json_key`; any other file as the text of one document.

    Args:
        source: Corpus.
        files: Files of the corpus, as `find_files` returns them.
        json_key: JSON key or Parquet column of the text.
        start: Position of the first batch. Default: the beginning.

    Raises:
        ValueError: If the corpus is empty, an archive is damaged, a column is missing or has no strings, or a
            required package is not installed.
    """
    if documents_size(files) == 0:
        raise ValueError(f"input {source} is empty: required at least one document")
    return _batches_from(source, files, json_key, start or Position())


def still_begins_with(source: Path, position: Position) -> bool:
    """Return whether the content of a file before `position` is unchanged.

    The result is False for a Parquet file, which has no checksum.

    Raises:
        ValueError: If an archive is damaged.
        OSError: If the file cannot be read.
    """
    if source.name.endswith(_PARQUET):
        return False
    left, checksum, block = position.content_bytes, 0, b""
    with _content(source) as (_, stream):
        while left and (block := stream.read(min(left, BATCH_BYTES))):
            left -= len(block)
            checksum = zlib.crc32(block, checksum)
        # A last line without a newline may have been extended.
        return not left and checksum == position.checksum and (block.endswith(b"\n") or not stream.read(1))


def read_documents(source: Path, json_key: str, file_glob: str) -> Iterator[str]:
    """Yield the text of every document of a source.

    Raises:
        ValueError, OSError: As `find_files`, `read_batches` and `Batch.read` do.
    """
    for batch in read_batches(source, find_files(source, file_glob), json_key):
        yield from batch.read(json_key)


def _matching_files(folder: Path, file_glob: str) -> list[Path]:
    try:
        files = [path for path in folder.glob(file_glob) if not path.is_dir()]
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"file glob {file_glob!r}: required a relative pattern: {error}") from error
    if not files:
        raise FileNotFoundError(f"input {folder}: no file matches {file_glob!r}")
    for path in files:
        _require_readable(path)
    if "**" in file_glob:
        _require_listable(folder)
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _require_readable(path: Path) -> None:
    """Raise ValueError for a broken link, for what is no regular file, and without permission to read."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"input {path} is a link to {os.readlink(path)}, which does not exist: remove it")
    if not path.is_file():
        raise ValueError(f"input {path} is a device, pipe or socket: required a regular file")
    if not os.access(path, os.R_OK):
        raise ValueError(f"input {path}: no permission to read it")


def _require_listable(folder: Path) -> None:
    """Raise ValueError for a folder below `folder` that cannot be listed, which a glob would skip."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"input {error.filename}: the folder cannot be listed: {error.strerror}") from error

    for _ in os.walk(folder, onerror=refuse):
        pass


def _batches_from(source: Path, files: Sequence[Path], json_key: str, start: Position) -> Iterator[Batch]:
    texts: list[Path] = []
    size = 0
    for number, path in enumerate(files[start.file :], start=start.file):
        is_text = not path.name.endswith(_SUFFIXES)
        if is_text:
            texts.append(path)
            size += path.stat().st_size
        if texts and (not is_text or size >= BATCH_BYTES):
            yield Batch(source, Position(number + is_text), size, files=tuple(texts))
            texts, size = [], 0
        if not is_text:
            first = start if number == start.file else Position(number)
            if path.name.endswith(_PARQUET):
                yield from _row_batches(path, json_key, first)
            else:
                yield from _line_batches(path, first)
    if texts:
        yield Batch(source, Position(len(files)), size, files=tuple(texts))


def _line_batches(source: Path, start: Position) -> Iterator[Batch]:
    with _content(source) as (raw, stream):
        position = start
        _skip(stream, start.content_bytes)
        while content := stream.read(BATCH_BYTES) + stream.readline():
            end = replace(
                position,
                content_bytes=position.content_bytes + len(content),
                lines=position.lines + content.count(b"\n") + (not content.endswith(b"\n")),
                # Decompression reads ahead by an amount that may depend on where it started.
                stored_bytes=max(position.stored_bytes, raw.tell()),
                checksum=zlib.crc32(content, position.checksum),
            )
            yield Batch(source, end, end.stored_bytes - position.stored_bytes, content, position.lines + 1)
            position = end


@contextmanager
def _content(source: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a JSON-lines file and return its raw and its decompressed stream.

    Raises:
        ValueError: If an archive is damaged.
    """
    with source.open("rb") as raw:
        try:
            yield raw, _decompressed(source, raw)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"input {source} is not a complete gzip file: {error}") from error
        except OSError as error:
            if source.suffix != ".zst" or error.errno:  # errors of pyarrow have no number
                raise
            raise ValueError(f"input {source} is not a complete zstd file: {error}") from error


def _skip(stream: BinaryIO, content_bytes: int) -> None:
    """Skip to a position; a compressed stream has to be read up to it."""
    if stream.seekable():
        stream.seek(content_bytes)
        return
    while content_bytes > 0 and (passed := stream.read(min(content_bytes, BATCH_BYTES))):
        content_bytes -= len(passed)


def _decompressed(source: Path, raw: BinaryIO) -> BinaryIO:
    if source.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), BATCH_BYTES)
    if source.suffix == ".zst":
        pyarrow = package(source)
        return io.BufferedReader(
            pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"), BATCH_BYTES
        )
    return raw


def _row_batches(source: Path, column: str, start: Position) -> Iterator[Batch]:
    position = start
    for rows in read_rows(source, column, BATCH_BYTES, start.row_groups, start.lines):
        end = replace(position, row_groups=rows.row_groups, lines=rows.end, stored_bytes=rows.stored_bytes)
        advance = end.stored_bytes - position.stored_bytes
        yield Batch(source, end, advance, first_line=position.lines + 1, rows=rows.values)
        position = end


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
    """Raise ValueError for an unpaired surrogate, which JSON can express but no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{origin}: unpaired surrogate at character {error.start}: required valid text"
        ) from error
    return text
