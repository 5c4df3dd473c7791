"""Timing of functions that take turns, so that a drift of the machine's speed does not favour one of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]


def paired(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> tuple[float, float, float]:
    """Time two functions in pairs of calls.

    The order changes from pair to pair, so that neither function always runs on the other's warm caches. A
    tenth more pairs run first and do not count.

    Returns:
        The median seconds of each function, and the median of the ratios first / second of all pairs.
    """
    sides = (first, second)
    seconds = np.empty((pairs, 2))
    for pair in range(-(pairs // 10 + 1), pairs):
        for side in (0, 1) if pair % 2 else (1, 0):
            started = time.perf_counter()
            sides[side]()
            if pair >= 0:
                seconds[pair, side] = time.perf_counter() - started
    medians = np.median(seconds, axis=0)
    return float(medians[0]), float(medians[1]), float(np.median(seconds[:, 0] / seconds[:, 1]))


def take_turns(sides: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, Seconds]:
    """Time functions on all ranks in turns. Collective: all ranks start each function together.

    The order is rotated by one from turn to turn. A tenth more turns run first and do not count.

    Returns:
        By name: the seconds of each turn, float64 [turns].
    """
    import torch.distributed as dist

    names = list(sides)
    seconds = {name: np.empty(turns) for name in names}
    for turn in range(-(turns // 10 + 1), turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            dist.barrier()
            started = time.perf_counter()
            sides[name]()
            if turn >= 0:
                seconds[name][turn] = time.perf_counter() - started
    return seconds


def median_and_error(values: Seconds) -> tuple[float, float]:
    """Return the median and its standard error.

    The error is estimated from the median absolute deviation, with the factors of a normal distribution.
    """
    median = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - median)))
    return median, 1.2533 * spread / float(len(values)) ** 0.5
