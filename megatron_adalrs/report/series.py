"""Reductions of long series for drawing. Pure numpy; non-finite values stay visible as gaps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Series = tuple[NDArray[np.float64], NDArray[np.float64]]


def thin(x: NDArray[np.float64], y: NDArray[np.float64], limit: int = 2000) -> Series:
    """At most `limit` points of a curve that look the same: the minimum and maximum of every bucket stay.

    Args:
        x, y: equally long 1-D arrays, in the order of drawing.
        limit: at least 6; a series that is no longer is returned as it is.

    The first and last points stay too, and of a bucket's non-finite values one, so that the gap is drawn.
    """
    if y.size <= limit:
        return x, y
    bounds = np.linspace(0, y.size, (limit - 2) // 3 + 1).astype(np.int64)
    starts = bounds[:-1]
    finite = np.isfinite(y)
    bucket = np.repeat(np.arange(starts.size), np.diff(bounds))
    picks = [np.array([0, y.size - 1])]
    for filled in (np.where(finite, y, np.inf), np.where(finite, -y, np.inf)):
        order = np.lexsort((filled, bucket))
        picks.append(order[starts])
    gaps = np.flatnonzero(~finite)
    picks.append(gaps[np.unique(bucket[gaps], return_index=True)[1]])
    chosen = np.unique(np.concatenate(picks))
    return x[chosen], y[chosen]


def running_mean(y: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred mean of the finite values among `window` (fewer at the ends); NaN where y is not finite."""
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    low = np.maximum(np.arange(y.size) - (window - 1) // 2, 0)
    high = np.minimum(np.arange(y.size) + window // 2 + 1, y.size)
    with np.errstate(invalid="ignore"):
        mean = (sums[high] - sums[low]) / (counts[high] - counts[low])
    return np.where(finite, mean, np.nan)


def smoothing_window(size: int) -> int:
    """How many values to average so that a curve of `size` noisy ones reads as a line; 1 if it is short."""
    return max(1, size // 100) if size >= 200 else 1
