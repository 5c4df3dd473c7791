"""Order of the data as three arrays: documents, starts of samples, and the shuffle of the samples.

The documents of a split are shuffled for every epoch and concatenated, epoch after epoch, into one stream of
tokens. Sample i of the stream has tokens i * seq_length to (i + 1) * seq_length, both included: neighbouring
samples overlap by one token, as in Megatron, since the last token is only a target. Samples are then shuffled
within the epoch in which they start, so that every epoch ends before the next begins. (Megatron shuffles all
epochs together and needs a special case for a last epoch that is only partly used.) Only the last sample of
an epoch extends into the next, by at most seq_length tokens.

The random numbers of an epoch depend only on the seed, the split and the epoch, and its shuffle is drawn
completely even if only a part is used. Therefore more samples never change the order of the first ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_DOCUMENTS, _SAMPLES = 0, 1


@dataclass(frozen=True)
class SampleIndex:
    """Order of the samples of a split.

    Attributes:
        documents: Document ids in stream order, up to the last sample, int64[P].
        samples: Index into `documents` and token offset of the first token of each of the M samples in the
            stream, and of the last token of the last sample, int64[M + 1, 2].
        shuffle: Number in the stream of each sample 0 to N - 1, int64[N], N <= M.
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
    """Build the order of `num_samples` samples.

    Time and memory are linear in the documents and samples of the epochs.

    Args:
        lengths: Tokens of each document, [D]; their sum is above `seq_length`.
        first_document: Id of the first document; the others follow.
        seq_length: Tokens per sample, without the last target.
        num_samples: Number of samples, above 0.
        seed: Seed of the order.
        stream: Number of the split, which distinguishes splits with the same seed.
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
    """Return the document [n] and the offset in it [n] of each token position [n]."""
    ends = np.cumsum(lengths)
    documents = np.searchsorted(ends, tokens, side="right")
    return documents, tokens - (ends - lengths)[documents]


def _permutation(seed: int, stream: int, epoch: int, what: int, length: int) -> npt.NDArray[np.int64]:
    # RandomState, unlike Generator, gives the same numbers in every version of numpy.
    bits = np.random.MT19937(np.random.SeedSequence((seed, stream, epoch, what)))
    return np.random.RandomState(bits).permutation(length).astype(np.int64, copy=False)
