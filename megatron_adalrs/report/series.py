"""Reductions of long series for plots. Values that are not finite stay visible as gaps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Series = tuple[NDArray[np.float64], NDArray[np.float64]]


def thin(x: NDArray[np.float64], y: NDArray[np.float64], limit: int = 2000) -> Series:
    """Reduce a curve to at most `limit` points without a visible change.

    Of every bucket the minimum and the maximum are kept, and one value that is not finite, so that the gap is
    drawn. The first and the last point are kept too.

    Args:
        x: Positions, 1-D, in the order in which they are drawn.
        y: Values, as many as positions.
        limit: Number of points, at least 6. A series that is not longer is returned as it is.
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


def with_gaps(x: NDArray[Any], y: NDArray[np.float64], chosen: NDArray[np.bool_]) -> Series:
    """Return the chosen points, with a NaN after each consecutive stretch of them."""
    index = np.flatnonzero(chosen)
    ends = np.flatnonzero(np.diff(index) != 1) + 1
    return np.insert(x[index].astype(np.float64), ends, np.nan), np.insert(y[index], ends, np.nan)


def running_mean(y: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the centred mean of the finite values among `window`, and NaN where `y` is not finite.

    At both ends the mean is over fewer values.
    """
    finite = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    low = np.maximum(np.arange(y.size) - (window - 1) // 2, 0)
    high = np.minimum(np.arange(y.size) + window // 2 + 1, y.size)
    with np.errstate(invalid="ignore"):
        mean = (sums[high] - sums[low]) / (counts[high] - counts[low])
    return np.where(finite, mean, np.nan)


def smoothing_window(size: int) -> int:
    """Return the length of the running mean for a curve of `size` noisy values; 1 for a short curve."""
    return max(1, size // 100) if size >= 200 else 1
