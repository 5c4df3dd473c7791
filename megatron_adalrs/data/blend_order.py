"""Which corpus serves which sample of a blend: a deterministic order without random numbers, in little
memory.

Time is cut into blocks of `WINDOW` samples. In every block corpus i has the same floor(share_i * WINDOW)
places, and what is left over goes to different corpora from block to block: to those that are owed most
(error feedback). A corpus that keeps one of those left-over places from a block to the next keeps the same
one. Therefore any WINDOW consecutive samples, wherever they begin, hold floor(share_i * WINDOW) samples of
corpus i or one more, the latter only where share_i * WINDOW is no whole number: less than one sample away
from it. (Over windows of every length at once no order of three or more corpora can promise that.)

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
    """The corpus of each of `num_samples` samples, and its number among the samples of that corpus.

    It takes 12 bytes a corpus for every `WINDOW` samples. More samples continue the order of fewer.

    Args:
        shares: of each corpus; not negative, with sum 1.
    """

    def __init__(self, shares: Sequence[Fraction], num_samples: int) -> None:
        expected = [share * WINDOW for share in shares]
        counts = [int(number) for number in expected]
        left_over = WINDOW - sum(counts)
        self._places = _spread([*counts, left_over])
        """Of each corpus in every block, ascending; the last ones are the left-over places."""
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
        """Corpus that serves sample `number`, and which of its samples that is."""
        block, place = divmod(number, WINDOW)
        corpus = int(self._corpus_at[place])
        if corpus == len(self._places) - 1:
            corpus = int(self._guests[block, np.searchsorted(self._places[-1], place)])
        return corpus, self._count(corpus, block, place)

    def counts(self, number: int) -> list[int]:
        """How many of the first `number` samples each corpus serves."""
        block, place = divmod(number, WINDOW)
        return [self._count(corpus, block, place) for corpus in range(len(self._places) - 1)]

    def _count(self, corpus: int, block: int, place: int) -> int:
        guests = self._guests[block, : np.searchsorted(self._places[-1], place)]
        own = np.searchsorted(self._places[corpus], place)
        return int(self._before[block, corpus] + own + np.count_nonzero(guests == corpus))


def _spread(counts: Sequence[int]) -> list[npt.NDArray[np.int64]]:
    """Ascending places 0 ... sum(counts) - 1, as many for each of them as it counts, spread as evenly as can
    be."""
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
    """int32[blocks, left_over]: the corpora in each block's left-over places, all of them different in a
    block.

    Args:
        fractions: places of each corpus in a block, on average; each below 1, with sum `left_over`.
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
