r"""Reader of the Megatron indexed dataset: tokens in `PREFIX.bin`, positions of sequences in `PREFIX.idx`.

Layout of the index, little endian, as written by Megatron-LM's `core/datasets/indexed_dataset.py`:

    9 bytes   magic  b"MMIDIDX\x00\x00"
    uint64    version, 1
    uint8     code of the token type, see `DTYPES`
    uint64    S, number of sequences
    uint64    D, number of document indices (documents + 1)
    int32[S]  tokens in each sequence
    int64[S]  byte offset of each sequence in the .bin
    int64[D]  first sequence of each document, and S at the end
    int8[S]   in multimodal datasets only: mode of each sequence, 0 for text
"""

from __future__ import annotations

import hashlib
import struct
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_adalrs.data.pair_files import bin_path, idx_path, require_pair

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name)
    for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
_BLOCK = 1 << 22  # sequences checked at once, so that opening a large index needs little memory


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the token type that Megatron uses: uint16 below 65500 tokens, else int32.

    Raises:
        ValueError: If the vocabulary needs more than 32 bits.
    """
    if vocab_size > 1 << 31:
        raise ValueError(
            f"vocabulary of {vocab_size} tokens: required at most 2^31, which are ids of 32 bits"
        )
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedDataset:
    """A read-only, memory-mapped view of a pair of files. The whole index is validated when it is opened.

    Attributes:
        sizes: Tokens in each of the S sequences, int32[S]. The length of the dataset is S.
        document_indices: First sequence of each of the D documents, and S, int64[D + 1].
        dtype: Type of the tokens.
        modes: Mode of each sequence, int8[S], of which 0 is text; None if the dataset is not multimodal.

    Raises:
        FileNotFoundError: If a file of the pair is missing.
        ValueError: If a file is damaged or has another format.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        index, tokens = idx_path(prefix), bin_path(prefix)
        require_pair(prefix)
        header = _read_header(index)
        self.dtype = header.dtype
        sections = np.asarray(np.memmap(index, dtype=np.uint8, mode="r", offset=HEADER.size))
        lengths_end, pointers_end, documents_end = header.section_ends
        self.sizes: npt.NDArray[np.int32] = sections[:lengths_end].view("<i4")
        pointers: npt.NDArray[np.int64] = sections[lengths_end:pointers_end].view("<i8")
        self.document_indices: npt.NDArray[np.int64] = sections[pointers_end:documents_end].view("<i8")
        self.modes: npt.NDArray[np.int8] | None = None
        if len(sections) > documents_end:
            self.modes = sections[documents_end:].view("i1")
        total_bytes = _check_sequences(index, self.sizes, pointers, self.dtype.itemsize)
        _check_documents(index, self.document_indices, header.sequences)
        found = tokens.stat().st_size
        if found != total_bytes:
            raise ValueError(
                f"{tokens} has {found} bytes, but {index} describes {total_bytes}: damaged or mixed pair"
            )
        self._pointers = pointers
        self._tokens: npt.NDArray[Any] = np.zeros(0, self.dtype)
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

    def require_text(self) -> None:
        """Raise ValueError if the dataset is multimodal and a sequence has another mode than 0, text."""
        if self.modes is None:
            return
        others = np.flatnonzero(self.modes)
        if len(others):
            first = int(others[0])
            raise ValueError(
                f"{idx_path(self.prefix)} is multimodal: {len(others)} of its {len(self)} sequences are not "
                f"text, the first of them sequence {first} with mode {self.modes[first]}: required text, "
                "which is mode 0"
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the .idx, which covers the length of every document."""
        with idx_path(self.prefix).open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    @cached_property
    def document_offsets(self) -> npt.NDArray[np.int64]:
        """Position of the first token of each document, and the number of tokens, int64[D + 1]."""
        starts = np.append(self._pointers, self.num_tokens * self.dtype.itemsize) // self.dtype.itemsize
        return starts[self.document_indices]

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> npt.NDArray[Any]:
        """Return `length` tokens of a sequence from `offset` on (default: to its end), read-only.

        Raises:
            IndexError: If sequence, offset or length is out of range.
        """
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {self.prefix}: required 0 <= sequence < {len(self)}")
        size = int(self.sizes[sequence])
        start = int(self._pointers[sequence]) // self.dtype.itemsize
        return self._slice(f"sequence {sequence}", start, size, offset, length)

    def get_document(self, document: int, offset: int = 0, length: int | None = None) -> npt.NDArray[Any]:
        """Return tokens of a document, whose sequences are contiguous in the .bin; see `get`."""
        if not 0 <= document < self.num_documents:
            raise IndexError(
                f"document {document} of {self.prefix}: required 0 <= document < {self.num_documents}"
            )
        start, end = (int(position) for position in self.document_offsets[document : document + 2])
        return self._slice(f"document {document}", start, end - start, offset, length)

    def tokens(self, start: int, length: int) -> npt.NDArray[Any]:
        """Return tokens `start` to `start + length` of the whole .bin, or fewer at its end."""
        return self._tokens[start : start + length]

    def _slice(self, name: str, start: int, size: int, offset: int, length: int | None) -> npt.NDArray[Any]:
        length = size - offset if length is None else length
        if not (0 <= offset <= size and 0 <= length <= size - offset):
            raise IndexError(
                f"{name} of {self.prefix}: tokens {offset}..{offset + length} of {size} do not exist"
            )
        return self._tokens[start + offset : start + offset + length]


class _Header(NamedTuple):
    """Content of the header of an index."""

    dtype: np.dtype[Any]
    sequences: int
    documents: int
    """Number of document indices."""

    @property
    def section_ends(self) -> tuple[int, int, int]:
        """Bytes after the header at which lengths, offsets and document indices end."""
        return 4 * self.sequences, 12 * self.sequences, 12 * self.sequences + 8 * self.documents


def _read_header(index: Path) -> _Header:
    """Return the header after checking the size of the file against it."""
    found = index.stat().st_size
    with index.open("rb") as stream:
        content = stream.read(HEADER.size)
    if content[: len(MAGIC)] != MAGIC:
        raise ValueError(
            f"{index} starts with {content[: len(MAGIC)]!r}: required {MAGIC!r}, a Megatron index"
        )
    if len(content) < HEADER.size:
        raise ValueError(
            f"{index} has {found} bytes: required at least {HEADER.size}, the header of an index"
        )
    _, version, code, sequences, documents = HEADER.unpack(content)
    if version != VERSION:
        raise ValueError(f"{index} has version {version}: required {VERSION}")
    if code not in DTYPES:
        raise ValueError(f"{index} has token type code {code}: required {min(DTYPES)} to {max(DTYPES)}")
    if documents < 1:
        raise ValueError(f"{index} has no document indices: required at least 1")
    header = _Header(DTYPES[code], sequences, documents)
    of_text = HEADER.size + header.section_ends[-1]
    if found not in (of_text, of_text + sequences):
        raise ValueError(
            f"{index} has {found} bytes: required {of_text} for its {sequences} sequences and {documents} "
            f"document indices, or {of_text + sequences} with the mode of each sequence (multimodal)"
        )
    return header


def _check_sequences(index: Path, sizes: npt.NDArray[Any], pointers: npt.NDArray[Any], itemsize: int) -> int:
    """Check that the sequences are contiguous from byte 0 on, and return their total number of bytes."""
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


def _check_documents(index: Path, document_indices: npt.NDArray[Any], sequences: int) -> None:
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
