"""What the package pyarrow reads, which is imported when it is needed: Parquet, and archives of zstd."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

_ROWS = 1 << 12  # at most in a batch, however small they are as they are stored


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows of one column: UTF-8, None for null.

    Up to their end: `row_groups` that are whole, `end` rows, `stored_bytes` of the file.
    """

    values: tuple[bytes | None, ...]
    row_groups: int
    end: int
    stored_bytes: int


def read_rows(source: Path, column: str, size: int, row_groups: int, row: int) -> Iterator[Rows]:
    """A column of strings of a Parquet file, behind so many whole row groups and rows, some `size` bytes at a
    time.

    What the file has beside row groups counts to the last one. Raises ValueError for a damaged file, and a
    column that is missing or holds anything else.
    """
    pyarrow = package(source)
    try:
        with pyarrow.parquet.ParquetFile(source, buffer_size=size) as file:
            _require_strings(pyarrow, source, file.schema_arrow, column)
            first = stored = 0
            for number in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(number)
                is_last = number + 1 == file.metadata.num_row_groups
                left = source.stat().st_size - stored
                extent = left if is_last else min(left, _stored_bytes(group))
                end = first + group.num_rows
                if number >= row_groups:
                    for values in _batches(pyarrow, file, number, column, size, max(0, row - first)):
                        row = max(row, first) + len(values)
                        done = stored + extent * (row - first) // group.num_rows
                        yield Rows(values, number + (row == end), row, done)
                first, stored = end, stored + extent
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"input {source} is not a whole Parquet file: {error}") from error


def package(source: Path) -> ModuleType:
    """Raises ValueError where it is not installed, naming the input that needs it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"input {source} needs the package pyarrow: pip install 'megatron-adalrs[data]'"
        ) from error
    module: ModuleType = pyarrow
    return module


def _require_strings(pyarrow: ModuleType, source: Path, schema: Any, column: str) -> None:
    if column not in schema.names:
        raise ValueError(
            f"{source}: there is no column {column!r}; columns found: {', '.join(map(repr, schema.names))}"
        )
    kind = schema.field(column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ValueError(f"{source}: column {column!r} is {kind}: required strings")


def _batches(
    pyarrow: ModuleType, file: Any, number: int, column: str, size: int, skip: int
) -> Iterator[tuple[bytes | None, ...]]:
    """Of a row group; where it starts changes none of those that follow."""
    group = file.metadata.row_group(number)
    columns = [group.column(index) for index in range(group.num_columns)]
    content = sum(one.total_uncompressed_size for one in columns if one.path_in_schema == column)
    rows = min(_ROWS, max(1, group.num_rows * size // max(1, content)))
    for batch in file.iter_batches(rows, row_groups=[number], columns=[column], use_threads=False):
        if skip < len(batch):
            # As bytes: that they are UTF-8 is for the reader of each row to see.
            yield tuple(batch.column(0)[skip:].cast(pyarrow.large_binary()).to_pylist())
        skip = max(0, skip - len(batch))


def _stored_bytes(group: Any) -> int:
    return sum(group.column(index).total_compressed_size for index in range(group.num_columns))
