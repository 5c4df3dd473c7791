"""Writer of the Megatron indexed dataset; `indexed_dataset.py` documents the format and reads it."""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_adalrs.data.indexed_dataset import DTYPES, HEADER, MAGIC, VERSION, IndexedDataset
from megatron_adalrs.data.pair_files import bin_path, idx_path
from megatron_adalrs.utils.atomic_files import atomic_write, publish, temporary_beside

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LENGTH_LIMIT = np.iinfo(np.int32).max


def write_index(
    path: Path, dtype: np.dtype[Any], lengths: npt.NDArray[Any], document_indices: npt.NDArray[Any]
) -> None:
    """Write an .idx file atomically.

    Args:
        path: File to write.
        dtype: Type of the tokens.
        lengths: Tokens in each of the S contiguous sequences, [S].
        document_indices: First sequence of each of the D documents, and S, [D + 1].

    Raises:
        OSError: If the file cannot be written.
    """
    bytes_each = lengths.astype(np.int64) * dtype.itemsize
    with atomic_write(path) as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, _CODES[dtype], len(lengths), len(document_indices)))
        stream.write(lengths.astype("<i4").tobytes())
        stream.write((np.cumsum(bytes_each) - bytes_each).astype("<i8").tobytes())
        stream.write(document_indices.astype("<i8").tobytes())


class IndexedDatasetBuilder:
    """Writes a pair under temporary names, which `finalize` renames: the .bin first, the .idx last.

    As a context manager it removes the temporary files if the block ends without `finalize`. A process that
    is killed leaves at most files whose names start with a dot, or a .bin without an .idx, but never a pair
    that looks valid.

    Raises:
        ValueError: If the format does not support the token type.
        OSError: If the folder cannot be written.
    """

    def __init__(self, prefix: Path | str, dtype: npt.DTypeLike) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in _CODES:
            names = ", ".join(known.name for known in _CODES)
            raise ValueError(f"token type {self.dtype.name}: required one of {names}")
        self._lengths = array("i")
        self._document_indices = array("q", [0])
        self._temporary = temporary_beside(bin_path(prefix))
        self._stream = self._temporary.open("xb")

    @property
    def num_documents(self) -> int:
        return len(self._document_indices) - 1

    def add_document(self, tokens: npt.ArrayLike, lengths: Sequence[int] | None = None) -> None:
        """Append a document.

        Args:
            tokens: Tokens of an integer type or of `dtype`, [n].
            lengths: Tokens in each sequence of the document. Default: a single sequence.

        Raises:
            ValueError: If a token is outside the range of `dtype`, or the sum of the lengths is not n.
        """
        values = np.asarray(tokens)
        if values.ndim != 1:
            raise ValueError(f"a document has shape {values.shape}: required one dimension")
        lengths = [len(values)] if lengths is None else [int(length) for length in lengths]
        if sum(lengths) != len(values) or min(lengths, default=0) < 0:
            raise ValueError(f"sequence lengths {lengths}: required non-negative with sum {len(values)}")
        if max(lengths, default=0) > _LENGTH_LIMIT:
            raise ValueError(f"a sequence has {max(lengths)} tokens: required at most {_LENGTH_LIMIT}")
        self._stream.write(self._cast(values).tobytes())
        self._lengths.extend(lengths)
        self._document_indices.append(len(self._lengths))

    def append(self, prefix: Path | str) -> None:
        """Append every document of another pair.

        Raises:
            ValueError: If it has another token type, or is not text only: modes are not written.
        """
        other = IndexedDataset(prefix)
        other.require_text()
        if other.dtype != self.dtype:
            raise ValueError(
                f"{idx_path(prefix)} has token type {other.dtype.name}: required {self.dtype.name}"
            )
        with bin_path(prefix).open("rb") as stream:
            shutil.copyfileobj(stream, self._stream, 1 << 20)
        first = len(self._lengths)
        self._lengths.frombytes(other.sizes.astype(np.int32).tobytes())
        self._document_indices.frombytes((other.document_indices[1:] + first).astype(np.int64).tobytes())

    def finalize(self) -> None:
        """Publish the pair and replace an existing one. The builder cannot be used afterwards."""
        index = idx_path(self.prefix)
        lengths = np.frombuffer(self._lengths, dtype=np.intc) if self._lengths else np.zeros(0, np.intc)
        # At no time may an old index be next to the new tokens.
        index.unlink(missing_ok=True)
        publish(self._stream, self._temporary, bin_path(self.prefix))
        write_index(index, self.dtype, lengths, np.frombuffer(self._document_indices, dtype=np.int64))

    def _cast(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if values.dtype == self.dtype or not values.size:
            return values.astype(self.dtype)
        if values.dtype.kind not in "iu" or self.dtype.kind == "f":
            raise ValueError(
                f"tokens of type {values.dtype.name}: required integers, or {self.dtype.name} itself"
            )
        limits, low, high = np.iinfo(self.dtype), int(values.min()), int(values.max())
        if low < limits.min or high > limits.max:
            raise ValueError(
                f"tokens from {low} to {high}: required {limits.min} to {limits.max} ({self.dtype.name})"
            )
        return values.astype(self.dtype)

    def __enter__(self) -> IndexedDatasetBuilder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._temporary.unlink(missing_ok=True)
