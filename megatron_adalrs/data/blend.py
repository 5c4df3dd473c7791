"""Datasets of a run: a blend of the training corpora, and the validation and test corpora one by one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_adalrs.config.corpora import Corpus
from megatron_adalrs.config.data import DEFAULT_SPLIT, DataConfig
from megatron_adalrs.data.blend_order import BlendOrder
from megatron_adalrs.data.gpt_dataset import (
    GPTDataset,
    TooFewTokens,
    build_gpt_datasets,
    check_vocabulary,
    split_documents,
)
from megatron_adalrs.data.indexed_dataset import IndexedDataset
from megatron_adalrs.data.pair_files import idx_path
from megatron_adalrs.utils.format import quantity

_BLEND_VERSION = 1  # increase with any change to `blend_order`
BYTES_PER_SAMPLE = 24
"""Size of a sample in a `SampleIndex`, without the documents."""
OTHER_SPLITS = ("90,5,5", "80,10,10", "50,25,25", "90,10,0", "80,20,0", "50,50,0", "1,0,0")
"""Values of --split that an error may propose, from the most training data to none for validation."""
Span = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """A corpus and its share of the samples or of a mean; the shares of all parts add up to 1."""

    name: str
    share: Fraction
    dataset: GPTDataset


@dataclass(frozen=True)
class Use:
    """Consumption of a corpus; `epochs` are passes over the tokens of its split."""

    name: str
    samples: int
    tokens: int
    epochs: float


class Blend:
    """Samples of several corpora, each of which keeps the order that it has on its own.

    Args:
        shares: Name and share of each corpus; the shares are not negative and their sum is 1.
        num_samples: Number of samples of `seq_length` + 1 tokens.
        build: Returns the dataset of the corpus with this index, with this number of samples.

    Raises:
        ValueError, OSError: As `build` does for a corpus without enough documents.
    """

    def __init__(
        self,
        shares: Sequence[tuple[str, Fraction]],
        num_samples: int,
        build: Callable[[int, int], GPTDataset],
    ) -> None:
        used = [(index, name, share) for index, (name, share) in enumerate(shares) if share]
        self._length = num_samples
        self._order = BlendOrder([share for _, _, share in used], num_samples)
        counts = self._order.counts(num_samples)
        self.parts = tuple(
            Part(name, share, build(index, max(1, count)))
            for (index, name, share), count in zip(used, counts, strict=True)
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> npt.NDArray[np.int64]:
        """Return the tokens of a sample, int64[seq_length + 1]. Raises IndexError outside 0 to len - 1."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of the blend: required 0 <= sample < {len(self)}")
        corpus, sample = self._order.locate(number)
        return self.parts[corpus].dataset[sample]

    @property
    def shares(self) -> dict[str, str]:
        """Shares of the samples by name, as exact fractions."""
        return {part.name: str(part.share) for part in self.parts}

    def order_digest(self, first_n: int = 65536) -> str:
        """Return 12 hex digits that identify the order of the first samples.

        For a single corpus they are those of `GPTDataset.order_digest`.
        """
        digests = [
            part.dataset.order_digest(count)
            for part, count in zip(self.parts, self._order.counts(min(first_n, len(self))), strict=True)
        ]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256(
            f"{_BLEND_VERSION} {list(self.shares.values())} {digests}".encode()
        ).hexdigest()[:12]

    def used(self, consumed_samples: int, skipped_samples: Iterable[Span] = ()) -> list[Use]:
        """Return the consumption of each corpus at a position in the data.

        Args:
            consumed_samples: Number of samples up to the position.
            skipped_samples: Disjoint spans (first, last + 1) of samples that were not used for training.
        """
        here = np.array(self._order.counts(consumed_samples))
        for first, last in skipped_samples:
            ends = [self._order.counts(min(end, consumed_samples)) for end in (first, last)]
            here -= np.subtract(ends[1], ends[0])
        uses = []
        for part, samples in zip(self.parts, here.tolist(), strict=True):
            tokens = samples * part.dataset.seq_length
            uses.append(Use(part.name, samples, tokens, tokens / part.dataset.num_tokens))
        return uses


@dataclass(frozen=True)
class Datasets:
    """Datasets of a run: `train` is a blend, `valid` and `test` have one part per corpus and may be empty."""

    train: Blend
    valid: tuple[Part, ...]
    test: tuple[Part, ...]


def build_datasets(
    data: DataConfig, seq_length: int, train_samples: int, evaluated_samples: int, seed: int
) -> Datasets:
    """Build the datasets of a configuration.

    Call it in one process first; all others then open the same caches.

    Raises:
        ValueError, OSError: As `build_gpt_datasets` does; ValueError also if the corpora differ in token type
            or the split has no training data, or the index of the samples would not fit in memory.
    """
    _require_memory("train_iters", train_samples)
    _require_memory("eval_iters", evaluated_samples)
    _require_one_token_type([corpus.prefix for corpus in data.corpora])

    def build(corpus: Corpus, split: str, samples: tuple[int, int, int]) -> Sequence[GPTDataset | None]:
        try:
            return build_gpt_datasets(corpus.prefix, split, seq_length, samples, seed, data.data_cache_path)
        except TooFewTokens as error:
            raise ValueError(_with_split_that_works(str(error), data, seq_length)) from None

    first_split, trained_on = data.parts[0]

    def trained(index: int, samples: int) -> GPTDataset:
        dataset = build(trained_on[index], first_split, (samples, 0, 0))[0]
        if dataset is None:
            raise ValueError(f"split: {first_split!r} leaves nothing to train on")
        return dataset

    train = Blend(shares_of(data, first_split, trained_on), train_samples, trained)
    held_out: tuple[list[Part], list[Part]] = [], []
    for split, corpora in data.parts:
        total = sum(corpus.size for corpus in corpora)
        for corpus in corpora:
            parts = build(corpus, split, (0, evaluated_samples, evaluated_samples))[1:]
            for into, dataset in zip(held_out, parts, strict=True):
                if dataset is not None:
                    into.append(Part(corpus.name, Fraction(corpus.size) / Fraction(total), dataset))
    return Datasets(train, *map(tuple, held_out))


def shares_of(data: DataConfig, split: str, corpora: Sequence[Corpus]) -> list[tuple[str, Fraction]]:
    """Return the name of each corpus with its share of the training samples."""
    sizes = [Fraction(repr(corpus.size)) for corpus in corpora]
    if data.blend_sizes == "epochs":
        for index, corpus in enumerate(corpora):
            indexed = IndexedDataset(corpus.prefix)
            documents = split_documents(split, indexed.num_documents)[0]
            offsets = indexed.document_offsets
            sizes[index] *= int(offsets[documents.stop] - offsets[documents.start])
    total = sum(sizes)
    if not total:
        raise ValueError(
            "blend_sizes: epochs of corpora without tokens to train on: required at least one with some"
        )
    return [(corpus.name, size / total) for corpus, size in zip(corpora, sizes, strict=True)]


def check_vocabularies(data: DataConfig, vocab_size: int) -> None:
    """Call `check_vocabulary` for every corpus."""
    for prefix in dict.fromkeys(corpus.prefix for corpus in data.corpora):
        check_vocabulary(prefix, vocab_size)


def _require_memory(field: str, samples: int) -> None:
    """Require that the index of this many samples fits in memory, where it is built."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if samples * BYTES_PER_SAMPLE > memory:
        raise ValueError(
            f"{field}: {samples} samples (steps x global batch size) need an index of {samples} x "
            f"{BYTES_PER_SAMPLE} bytes = {quantity(samples * BYTES_PER_SAMPLE, 'B')}: this host has "
            f"{quantity(memory, 'B')} of memory; lower {field}"
        )


def _with_split_that_works(message: str, data: DataConfig, seq_length: int) -> str:
    """Add the first of a few values of --split that leaves a sample in every part of every corpus."""
    if data.data_path is None:
        return message
    corpora = [IndexedDataset(corpus.prefix) for corpus in data.corpora]
    for split in OTHER_SPLITS:
        documents = [(corpus, split_documents(split, corpus.num_documents)) for corpus in corpora]
        if all(
            int(corpus.document_offsets[part.stop] - corpus.document_offsets[part.start]) > seq_length
            for corpus, parts in documents
            for part, weight in zip(parts, split.split(","), strict=True)
            if weight != "0"
        ):
            return f"{message}; --split is {data.split or DEFAULT_SPLIT}, --split {split} works"
    return f"{message}; no --split leaves enough: give more data or a shorter --seq-length"


def _require_one_token_type(prefixes: Sequence[Path | str]) -> None:
    types = {prefix: IndexedDataset(prefix).dtype.name for prefix in dict.fromkeys(prefixes)}
    first, *others = types
    for other in others:
        if types[other] != types[first]:
            raise ValueError(
                f"{idx_path(other)} has token type {types[other]}, {idx_path(first)} has {types[first]}: "
                "required the same type, that of one tokenizer"
            )
