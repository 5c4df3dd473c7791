"""The order of the data as three arrays: which documents, where each sample starts, which sample comes when.

Documents of a split are shuffled anew for every epoch and laid end to end, epoch after epoch, into one
stream of tokens. Sample i of the stream covers tokens i * seq_length ... (i + 1) * seq_length, both included:
neighbours overlap by one token, as in Megatron, since the last token is only ever a target. Samples are then
shuffled within the epoch in which they start, so every epoch is finished before the next begins. (Megatron
shuffles all epochs together and needs a special case for a last epoch that is only partly used; here there is
none.) Only the last sample of an epoch reaches, by at most seq_length tokens, into the next.

The random numbers of an epoch depend on the seed, the split and the epoch alone, and its shuffle is drawn in
full even if only a part is used. So asking for more samples never changes the order of the first ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_DOCUMENTS, _SAMPLES = 0, 1


@dataclass(frozen=True)
class SampleIndex:
    """`documents` int64[P]: document ids in stream order, as far as any sample reaches.
    `samples` int64[M + 1, 2]: place in `documents` and token offset there of the first token of each of the
    stream's M samples, and of the last token of the last one.
    `shuffle` int64[N]: the sample of the stream that is served as number 0 ... N - 1; N <= M.
    """

    documents: npt.NDArray[np.int64]
    samples: npt.NDArray[np.int64]
    shuffle: npt.NDArray[np.int64]


def build_sample_index(
    lengths: npt.NDArray[np.int64],
    *,
    first_document: int,
    seq_length: int,
    num_samples: int,
    seed: int,
    stream: int,
) -> SampleIndex:
    """The order of `num_samples` samples over documents of `lengths` [D] tokens.

    Their ids count from `first_document`; `stream` tells splits with the same seed apart. Vectorised:
    time and memory are linear in the documents and samples of the epochs that are begun. The caller has
    checked that sum(lengths) > seq_length and num_samples > 0.
    """
    epoch_tokens = int(lengths.sum())
    documents: list[npt.NDArray[Any]] = []
    samples: list[npt.NDArray[Any]] = []
    shuffle: list[npt.NDArray[Any]] = []
    epoch = first = 0  # `first`: the first sample that starts in this epoch
    while first < num_samples:
        order = _permutation(seed, stream, epoch, _DOCUMENTS, len(lengths))
        after = -(-(epoch + 1) * epoch_tokens // seq_length)
        starts = np.arange(first, after, dtype=np.int64) * seq_length - epoch * epoch_tokens
        places, offsets = _locate(starts, lengths[order])
        documents.append(first_document + order)
        samples.append(np.stack((epoch * len(lengths) + places, offsets), axis=1))
        drawn = _permutation(seed, stream, epoch, _SAMPLES, after - first)
        shuffle.append(first + drawn[: num_samples - first])
        epoch, first = epoch + 1, after
    # The last sample ends with the first token of the sample after it, which starts in the next epoch.
    order = _permutation(seed, stream, epoch, _DOCUMENTS, len(lengths))
    places, offsets = _locate(np.array([first * seq_length - epoch * epoch_tokens]), lengths[order])
    documents.append(first_document + order[: places[0] + 1])
    samples.append(np.stack((epoch * len(lengths) + places, offsets), axis=1))
    return SampleIndex(np.concatenate(documents), np.concatenate(samples), np.concatenate(shuffle))


def _locate(
    tokens: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Documents [n] and offsets in them [n] of `tokens` [n], which count documents of `lengths` [D]."""
    ends = np.cumsum(lengths)
    documents = np.searchsorted(ends, tokens, side="right")
    return documents, tokens - (ends - lengths)[documents]


def _permutation(seed: int, stream: int, epoch: int, what: int, length: int) -> npt.NDArray[np.int64]:
    # RandomState, unlike Generator, gives the same numbers in every version of numpy.
    bits = np.random.MT19937(np.random.SeedSequence((seed, stream, epoch, what)))
    return np.random.RandomState(bits).permutation(length).astype(np.int64, copy=False)
