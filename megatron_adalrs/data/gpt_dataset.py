"""Fixed-length samples of the documents of an indexed dataset, in a reproducible random order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_adalrs.data.index_cache import load_or_build
from megatron_adalrs.data.indexed_dataset import IndexedDataset
from megatron_adalrs.data.pair_files import bin_path
from megatron_adalrs.data.sample_index import SampleIndex, build_sample_index

SPLITS = ("train", "valid", "test")
_ORDER_VERSION = 1  # increase with any change to the order of the data: it is part of the key of the cache
_SCANNED_TOKENS = 10_000_000
_SCANNED_BLOCK = 100_000


class TooFewTokens(ValueError):
    """A split has fewer tokens than one sample."""


class GPTDataset:
    """`num_samples` samples of `seq_length` + 1 tokens from documents of a dataset.

    The documents are repeated for as many epochs as needed. The order, described in `sample_index.py`,
    depends on the index of the dataset, the documents, the name of the split, `seq_length` and `seed`. More
    samples continue the order of fewer. The first process builds it and stores it in `cache_dir`.

    Raises:
        ValueError: If a size is out of range, the documents have fewer than `seq_length` + 1 tokens, or the
            dataset contains other things than text.
        OSError: If the cache cannot be written.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: range,
        *,
        split: str,
        seq_length: int,
        num_samples: int,
        seed: int,
        cache_dir: Path | str,
    ) -> None:
        offsets = indexed.document_offsets[documents.start : documents.stop + 1]
        self.num_tokens = int(offsets[-1] - offsets[0])
        _require_sizes(split, seq_length, num_samples, seed)
        indexed.require_text()
        if indexed.dtype.kind == "f":
            raise ValueError(
                f"{bin_path(indexed.prefix)} has token type {indexed.dtype.name}: required integers"
            )
        if self.num_tokens < seq_length + 1:
            raise TooFewTokens(
                f"the {split} split of {indexed.prefix} has {self.num_tokens} tokens in {len(documents)} "
                f"documents: required at least seq_length({seq_length}) + 1 = {seq_length + 1}"
            )
        self.split = split
        self.seq_length = seq_length
        self.documents = documents
        self._indexed = indexed
        key = {
            "order_version": _ORDER_VERSION,
            "dataset_sha256": indexed.digest,
            "documents": [documents.start, documents.stop],
            "split": split,
            "seq_length": seq_length,
            "num_samples": num_samples,
            "seed": seed,
        }
        self._index: SampleIndex = load_or_build(
            Path(cache_dir),
            split,
            key,
            lambda: build_sample_index(
                np.diff(offsets),
                first_document=documents.start,
                seq_length=seq_length,
                num_samples=num_samples,
                seed=seed,
                stream=SPLITS.index(split),
            ),
        )

    def __len__(self) -> int:
        return len(self._index.shuffle)

    def __getitem__(self, number: int) -> npt.NDArray[np.int64]:
        """Return the tokens of a sample, int64[seq_length + 1]. Raises IndexError outside 0 to len - 1."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of the {self.split} split: required 0 <= sample < {len(self)}")
        sample = self._index.shuffle[number]
        (first, begin), (last, end) = self._index.samples[sample : sample + 2].tolist()
        tokens = np.empty(self.seq_length + 1, dtype=np.int64)
        filled = 0
        for place, document in enumerate(self._index.documents[first : last + 1].tolist(), start=first):
            offset = begin if place == first else 0
            length = end + 1 - offset if place == last else None
            part = self._indexed.get_document(document, offset, length)
            tokens[filled : filled + len(part)] = part
            filled += len(part)
        return tokens

    def order_digest(self, first_n: int = 65536) -> str:
        """Return 12 hex digits that identify the order of the first samples.

        They cover the index of the dataset and the documents and offsets of the first `first_n` samples.
        """
        starts = self._index.samples[self._index.shuffle[:first_n]]
        order = np.stack((self._index.documents[starts[:, 0]], starts[:, 1]), axis=1)
        digest = hashlib.sha256(f"{self._indexed.digest} {self.seq_length} ".encode())
        digest.update(order.astype("<i8").tobytes())
        return digest.hexdigest()[:12]


def _require_sizes(split: str, seq_length: int, num_samples: int, seed: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: required one of {', '.join(SPLITS)}")
    for field, value, least in (
        ("seq_length", seq_length, 1),
        ("num_samples", num_samples, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{field} {value} of the {split} split: required at least {least}")


def parse_split(split: str | Sequence[float]) -> tuple[float, float, float]:
    """Parse the weights of train, valid and test, from "969,30,1" or numbers.

    Raises:
        ValueError: If they are not three, not finite, negative or all zero.
    """
    parts = split.split(",") if isinstance(split, str) else list(split)
    try:
        weights = [float(part) for part in parts]
    except ValueError as error:
        raise ValueError(f"split {split!r}: required three numbers, like 969,30,1") from error
    if len(weights) != len(SPLITS):
        raise ValueError(f"split {split!r} has {len(weights)} weights: required three ({', '.join(SPLITS)})")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"split {split!r}: required weights that are finite and not negative")
    if sum(weights) == 0:
        raise ValueError(f"split {split!r}: required at least one weight above zero")
    train, valid, test = weights
    return train, valid, test


def split_documents(split: str | Sequence[float], num_documents: int) -> tuple[range, range, range]:
    """Return consecutive ranges of documents in proportion to the weights, which cover all documents.

    A small weight of few documents may round to an empty range. Raises ValueError as `parse_split` does.
    """
    weights = parse_split(split)
    total = sum(weights)
    bounds = [round(sum(weights[:count]) / total * num_documents) for count in range(len(weights) + 1)]
    train, valid, test = (range(start, stop) for start, stop in pairwise(bounds))
    return train, valid, test


def build_gpt_datasets(
    data_path: Path | str,
    split: str | Sequence[float],
    seq_length: int,
    num_samples: tuple[int, int, int],
    seed: int,
    cache_dir: Path | str | None = None,
) -> tuple[GPTDataset | None, GPTDataset | None, GPTDataset | None]:
    """Build the train, valid and test datasets of the pair `data_path`.bin/.idx.

    Call it in one process first; all others then open the same cache.

    Args:
        data_path: Prefix of the pair.
        split: Weights of the splits.
        seq_length: Tokens per sample, without the last target.
        num_samples: Number of samples of each split. A split without samples or weight is None.
        seed: Seed of the order.
        cache_dir: Folder for the sample indices. Default: the folder `cache` next to the data.

    Raises:
        FileNotFoundError: If a file of the pair is missing.
        ValueError: If the pair is damaged, the weights are not valid, or a requested split has fewer than
            `seq_length` + 1 tokens.
        OSError: If the cache cannot be written.
    """
    if len(num_samples) != len(SPLITS) or min(num_samples) < 0:
        raise ValueError(f"num_samples {num_samples}: required three numbers that are not negative")
    weights = parse_split(split)
    indexed = IndexedDataset(data_path)
    cache_dir = Path(data_path).parent / "cache" if cache_dir is None else cache_dir
    train, valid, test = (
        GPTDataset(
            indexed,
            documents,
            split=name,
            seq_length=seq_length,
            num_samples=samples,
            seed=seed,
            cache_dir=cache_dir,
        )
        if samples and weight
        else None
        for name, documents, samples, weight in zip(
            SPLITS, split_documents(split, indexed.num_documents), num_samples, weights, strict=True
        )
    )
    return train, valid, test


def check_vocabulary(data_path: Path | str, vocab_size: int) -> None:
    """Raise ValueError if the data contains a token outside a vocabulary of `vocab_size`, or is not text.

    Up to 10 million tokens are all read; of more tokens, 100 blocks are read that are spread evenly.
    """
    indexed = IndexedDataset(data_path)
    indexed.require_text()
    starts = range(0, indexed.num_tokens, _SCANNED_BLOCK)
    if indexed.num_tokens > _SCANNED_TOKENS:
        last = indexed.num_tokens - _SCANNED_BLOCK
        starts = np.linspace(0, last, _SCANNED_TOKENS // _SCANNED_BLOCK, dtype=np.int64).tolist()
    low, high = 0, -1
    for start in starts:
        block = indexed.tokens(start, _SCANNED_BLOCK)
        low, high = min(low, int(block.min())), max(high, int(block.max()))
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"{bin_path(data_path)} holds token {wrong}: required 0 to {vocab_size - 1}, "
            f"the vocabulary of {vocab_size} (was the data made with another tokenizer?)"
        )
