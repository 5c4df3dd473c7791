"""The Megatron indexed dataset: `PREFIX.bin` holds tokens back to back, `PREFIX.idx` says where each sequence
is.

Layout of the index, all little endian, as written by Megatron-LM's `core/datasets/indexed_dataset.py`:

    9 bytes   magic  b"MMIDIDX\\x00\\x00"
    uint64    version, 1
    uint8     code of the token type, see `DTYPES`
    uint64    S, number of sequences
    uint64    D, number of document indices (documents + 1)
    int32[S]  tokens in each sequence
    int64[S]  byte offset of each sequence in the .bin
    int64[D]  first sequence of each document, and S at the end
"""

from __future__ import annotations

import hashlib
import shutil
import struct
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatron_adalrs.utils.atomic_files import atomic_write, publish, temporary_beside

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name)
    for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LENGTH_LIMIT = np.iinfo(np.int32).max
_BLOCK = 1 << 22  # sequences checked at once, so that opening a large index needs little memory


def best_dtype(vocab_size: int) -> np.dtype:
    """The token type Megatron picks: uint16 below 65500 tokens, else int32. Raises ValueError beyond that."""
    if vocab_size > 1 << 31:
        raise ValueError(
            f"vocabulary of {vocab_size} tokens: required at most 2^31, which are ids of 32 bits"
        )
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def bin_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """A read-only, memory-mapped view of a finished pair; everything the index claims is checked on opening.

    `sizes` is int32[S], tokens per sequence; `document_indices` is int64[D + 1], the first sequence of each
    of the D documents and then S; `dtype` is the type of the tokens; `len` is S.

    Raises FileNotFoundError if a file of the pair is missing, ValueError (file, found, expected) if it is
    damaged or of another format.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        index, tokens = idx_path(prefix), bin_path(prefix)
        for path in (index, tokens):
            if not path.is_file():
                raise FileNotFoundError(
                    f"indexed dataset {prefix}: there is no file {path} "
                    "(required: the common prefix of a .bin/.idx pair, without the extension)"
                )
        self.dtype, sequences = _read_header(index)
        sections = np.asarray(np.memmap(index, dtype=np.uint8, mode="r", offset=HEADER.size))
        lengths_end, pointers_end = 4 * sequences, 12 * sequences
        self.sizes: npt.NDArray[np.int32] = sections[:lengths_end].view("<i4")
        pointers: npt.NDArray[np.int64] = sections[lengths_end:pointers_end].view("<i8")
        self.document_indices: npt.NDArray[np.int64] = sections[pointers_end:].view("<i8")
        total_bytes = _check_sequences(index, self.sizes, pointers, self.dtype.itemsize)
        _check_documents(index, self.document_indices, sequences)
        found = tokens.stat().st_size
        if found != total_bytes:
            raise ValueError(
                f"{tokens} has {found} bytes, but {index} describes {total_bytes}: damaged or mixed pair"
            )
        self._pointers = pointers
        self._tokens: npt.NDArray = np.zeros(0, self.dtype)
        if found:  # an empty file cannot be mapped
            self._tokens = np.asarray(np.memmap(tokens, dtype=self.dtype, mode="r"))

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the .idx: it covers the length of every document, all that an order depends on."""
        with idx_path(self.prefix).open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    @cached_property
    def document_offsets(self) -> npt.NDArray[np.int64]:
        """int64[D + 1]: position of each document's first token in the .bin, and the number of tokens."""
        starts = np.append(self._pointers, self.num_tokens * self.dtype.itemsize) // self.dtype.itemsize
        return starts[self.document_indices]

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> npt.NDArray:
        """Tokens `offset ... offset + length` (default: to the end) of one sequence: `dtype`, read-only.

        Raises IndexError where sequence, offset or length lie outside.
        """
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {self.prefix}: required 0 <= sequence < {len(self)}")
        size = int(self.sizes[sequence])
        start = int(self._pointers[sequence]) // self.dtype.itemsize
        return self._slice(f"sequence {sequence}", start, size, offset, length)

    def get_document(self, document: int, offset: int = 0, length: int | None = None) -> npt.NDArray:
        """Like `get`, for a whole document: its sequences lie back to back in the .bin."""
        if not 0 <= document < self.num_documents:
            raise IndexError(
                f"document {document} of {self.prefix}: required 0 <= document < {self.num_documents}"
            )
        start, end = (int(position) for position in self.document_offsets[document : document + 2])
        return self._slice(f"document {document}", start, end - start, offset, length)

    def tokens(self, start: int, length: int) -> npt.NDArray:
        """Tokens `start ... start + length` of the whole .bin, whatever their sequence; fewer at its end."""
        return self._tokens[start : start + length]

    def _slice(self, name: str, start: int, size: int, offset: int, length: int | None) -> npt.NDArray:
        length = size - offset if length is None else length
        if not (0 <= offset <= size and 0 <= length <= size - offset):
            raise IndexError(
                f"{name} of {self.prefix}: tokens {offset}..{offset + length} of {size} do not exist"
            )
        return self._tokens[start + offset : start + offset + length]


def _read_header(index: Path) -> tuple[np.dtype, int]:
    """Token type and number of sequences, once the size of the file agrees with what the header says."""
    found = index.stat().st_size
    with index.open("rb") as stream:
        header = stream.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC:
        raise ValueError(
            f"{index} starts with {header[: len(MAGIC)]!r}: required {MAGIC!r}, a Megatron index"
        )
    if len(header) < HEADER.size:
        raise ValueError(
            f"{index} has {found} bytes: required at least {HEADER.size}, the header of an index"
        )
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != VERSION:
        raise ValueError(f"{index} has version {version}: required {VERSION}")
    if code not in DTYPES:
        raise ValueError(f"{index} has token type code {code}: required {min(DTYPES)} to {max(DTYPES)}")
    if documents < 1:
        raise ValueError(f"{index} has no document indices: required at least 1")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if found != expected:
        raise ValueError(
            f"{index} has {found} bytes: required {expected} for its {sequences} sequences and "
            f"{documents} document indices"
        )
    return DTYPES[code], sequences


def _check_sequences(index: Path, sizes: npt.NDArray, pointers: npt.NDArray, itemsize: int) -> int:
    """Require sequences back to back from byte 0 on; return the bytes that they take."""
    expected_start = 0
    for start in range(0, len(sizes), _BLOCK):
        lengths = sizes[start : start + _BLOCK].astype(np.int64)
        if (negative := np.flatnonzero(lengths < 0)).size:
            first = int(negative[0])
            raise ValueError(
                f"{index}: sequence {start + first} has {lengths[first]} tokens: required at least 0"
            )
        ends = expected_start + np.cumsum(lengths * itemsize)
        expected = np.concatenate(([expected_start], ends[:-1]))
        block = pointers[start : start + _BLOCK]
        if (wrong := np.flatnonzero(block != expected)).size:
            first = int(wrong[0])
            raise ValueError(
                f"{index}: sequence {start + first} starts at byte {block[first]}: "
                f"required {expected[first]}, the end of the one before it"
            )
        expected_start = int(ends[-1])
    return expected_start


def _check_documents(index: Path, document_indices: npt.NDArray, sequences: int) -> None:
    if document_indices[0] != 0:
        raise ValueError(f"{index}: the first document starts at sequence {document_indices[0]}: required 0")
    if document_indices[-1] != sequences:
        raise ValueError(
            f"{index}: the documents end at sequence {document_indices[-1]}: required {sequences}"
        )
    if (falling := np.flatnonzero(document_indices[1:] < document_indices[:-1])).size:
        first = int(falling[0]) + 1
        raise ValueError(
            f"{index}: document index {first} is {document_indices[first]}: required at least "
            f"{document_indices[first - 1]}, the one before it"
        )


def write_index(path: Path, dtype: np.dtype, lengths: npt.NDArray, document_indices: npt.NDArray) -> None:
    """An .idx of S sequences of `lengths` [S] tokens, back to back, and D + 1 `document_indices` [D + 1].

    The file appears whole or not at all. Raises OSError where it cannot be written.
    """
    bytes_each = lengths.astype(np.int64) * dtype.itemsize
    with atomic_write(path) as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, _CODES[dtype], len(lengths), len(document_indices)))
        stream.write(lengths.astype("<i4").tobytes())
        stream.write((np.cumsum(bytes_each) - bytes_each).astype("<i8").tobytes())
        stream.write(document_indices.astype("<i8").tobytes())


class IndexedDatasetBuilder:
    """Writes a pair under temporary names; `finalize` makes it appear, .bin first and .idx last.

    As a context manager it removes the temporaries when the block ends without `finalize`. A process that is
    killed leaves at most files whose names start with a dot, or a .bin without an .idx: never a pair that
    looks valid. Raises ValueError for a type that the format does not know, OSError where the folder cannot
    be written.
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
        """Append one document: `tokens` [n] of any integer (or the builder's own) type that `dtype` can hold.

        `lengths` cuts the document into several sequences; by default it is one. Raises ValueError for tokens
        outside the type and for lengths that do not add up to n.
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
        """Append every document of another finished pair of the same token type (ValueError for another
        type).
        """
        other = IndexedDataset(prefix)
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
        """Publish the pair, replacing one that is there; the builder is spent afterwards."""
        index = idx_path(self.prefix)
        lengths = np.frombuffer(self._lengths, dtype=np.intc) if self._lengths else np.zeros(0, np.intc)
        # An old index must not meet the new tokens, however short the moment.
        index.unlink(missing_ok=True)
        publish(self._stream, self._temporary, bin_path(self.prefix))
        write_index(index, self.dtype, lengths, np.frombuffer(self._document_indices, dtype=np.int64))

    def _cast(self, values: npt.NDArray) -> npt.NDArray:
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
