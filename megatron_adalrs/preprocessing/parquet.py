"""Reader of Parquet files. The package pyarrow, which also reads zstd archives, is imported when needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

_ROWS = 1 << 12  # most rows in a batch, however small they are


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a column.

    Attributes:
        values: UTF-8 text of each row, None for null.
        row_groups: Complete row groups up to the end of these rows.
        end: Rows up to the end of these rows.
        stored_bytes: Bytes of the file up to the end of these rows.
    """

    values: tuple[bytes | None, ...]
    row_groups: int
    end: int
    stored_bytes: int


def read_rows(source: Path, column: str, size: int, row_groups: int, row: int) -> Iterator[Rows]:
    """Yield the rows of a string column of a Parquet file, about `size` bytes at a time.

    Bytes of the file outside row groups are counted with the last one.

    Args:
        source: Parquet file.
        column: Name of the column.
        size: Bytes per batch.
        row_groups: Complete row groups to skip.
        row: Rows to skip, those of the skipped row groups included.

    Raises:
        ValueError: If the file is damaged, or the column is missing or has no strings.
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
        raise ValueError(f"input {source} is not a complete Parquet file: {error}") from error


def package(source: Path) -> ModuleType:
    """Import pyarrow. Raises ValueError, which names the input that needs it, if it is not installed."""
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
    """Yield the batches of a row group, which do not depend on how many rows are skipped."""
    group = file.metadata.row_group(number)
    columns = [group.column(index) for index in range(group.num_columns)]
    content = sum(one.total_uncompressed_size for one in columns if one.path_in_schema == column)
    rows = min(_ROWS, max(1, group.num_rows * size // max(1, content)))
    for batch in file.iter_batches(rows, row_groups=[number], columns=[column], use_threads=False):
        if skip < len(batch):
            # Bytes: each row is checked for UTF-8 when it is decoded.
            yield tuple(batch.column(0)[skip:].cast(pyarrow.large_binary()).to_pylist())
        skip = max(0, skip - len(batch))


def _stored_bytes(group: Any) -> int:
    return sum(group.column(index).total_compressed_size for index in range(group.num_columns))
