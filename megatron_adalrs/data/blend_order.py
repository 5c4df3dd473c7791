"""Order of the corpora in a blend: deterministic, without random numbers, and small in memory.

The samples are divided into blocks of `WINDOW`. In every block corpus i has the same floor(share_i * WINDOW)
places. The remaining places go to different corpora from block to block: to those with the largest deficit
(error feedback). A corpus that has a remaining place in two consecutive blocks has the same one. Therefore
any WINDOW consecutive samples contain floor(share_i * WINDOW) samples of corpus i, or one more if share_i *
WINDOW is not an integer, which is less than one sample away from the exact share. (No order of three or more
corpora can guarantee this for windows of every length.)

Within a block the places are spread evenly by earliest deadlines: the j-th of a corpus' c places lies in
floor((j - 1) * WINDOW / c) to ceil(j * WINDOW / c) - 1, so that of the first n places it has n * c / WINDOW,
rounded up or down (Steiner and Yeomans, Level schedules for mixed-model, just-in-time processes, 1993).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

WINDOW = 10_000


class BlendOrder:
    """Corpus of each sample, and number of the sample within that corpus.

    It needs 12 bytes per corpus for every `WINDOW` samples. A longer order continues a shorter one.

    Args:
        shares: Share of each corpus; not negative, with sum 1.
        num_samples: Length of the order.
    """

    def __init__(self, shares: Sequence[Fraction], num_samples: int) -> None:
        expected = [share * WINDOW for share in shares]
        counts = [int(number) for number in expected]
        left_over = WINDOW - sum(counts)
        self._places = _spread([*counts, left_over])
        """Places of each corpus in every block, ascending; the last entry has the remaining places."""
        self._corpus_at = np.empty(WINDOW, dtype=np.int64)
        for corpus, places in enumerate(self._places):
            self._corpus_at[places] = corpus
        fractions = [float(number - count) for number, count in zip(expected, counts, strict=True)]
        self._guests = _guests(fractions, left_over, num_samples // WINDOW + 1)
        blocks = np.arange(len(self._guests) + 1)
        self._before = blocks[:, None] * np.array(counts)  # samples of each corpus before each block
        for corpus in range(len(shares)):
            self._before[1:, corpus] += np.cumsum((self._guests == corpus).sum(axis=1))

    def locate(self, number: int) -> tuple[int, int]:
        """Return the corpus of sample `number`, and the number of the sample within that corpus."""
        block, place = divmod(number, WINDOW)
        corpus = int(self._corpus_at[place])
        if corpus == len(self._places) - 1:
            corpus = int(self._guests[block, np.searchsorted(self._places[-1], place)])
        return corpus, self._count(corpus, block, place)

    def counts(self, number: int) -> list[int]:
        """Return how many of the first `number` samples belong to each corpus."""
        block, place = divmod(number, WINDOW)
        return [self._count(corpus, block, place) for corpus in range(len(self._places) - 1)]

    def _count(self, corpus: int, block: int, place: int) -> int:
        guests = self._guests[block, : np.searchsorted(self._places[-1], place)]
        own = np.searchsorted(self._places[corpus], place)
        return int(self._before[block, corpus] + own + np.count_nonzero(guests == corpus))


def _spread(counts: Sequence[int]) -> list[npt.NDArray[np.int64]]:
    """Return ascending places in 0 to sum(counts) - 1 for each corpus, spread as evenly as possible."""
    total = sum(counts)
    places: list[list[int]] = [[] for _ in counts]
    waiting = [
        (0, index) for index, count in enumerate(counts) if count
    ]  # by when the next one may be placed
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []  # by when it must be
    for place in range(total):
        while waiting and waiting[0][0] <= place:
            _, index = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(len(places[index]) + 1) * total // counts[index]), index))
        _, index = heapq.heappop(ready)
        places[index].append(place)
        if len(places[index]) < counts[index]:
            heapq.heappush(waiting, (len(places[index]) * total // counts[index], index))
    return [np.array(each, dtype=np.int64) for each in places]


def _guests(fractions: Sequence[float], left_over: int, blocks: int) -> npt.NDArray[np.int32]:
    """Return the corpora in the remaining places of each block, int32[blocks, left_over].

    They are all different within a block.

    Args:
        fractions: Average number of remaining places of each corpus per block, below 1, with sum `left_over`.
        left_over: Number of remaining places per block.
        blocks: Number of blocks.
    """
    guests = np.empty((blocks, left_over), dtype=np.int32)
    if not left_over:
        return guests
    candidates = [corpus for corpus, fraction in enumerate(fractions) if fraction]
    had = [0] * len(fractions)
    row: list[int] = []
    for block in range(blocks):
        surplus = {corpus: had[corpus] - (block + 1) * fractions[corpus] for corpus in candidates}
        chosen = sorted(candidates, key=surplus.__getitem__)[:left_over]
        new = iter([corpus for corpus in chosen if corpus not in row])
        row = [corpus if corpus in chosen else next(new) for corpus in row] or chosen
        for corpus in chosen:
            had[corpus] += 1
        guests[block] = row
    return guests
