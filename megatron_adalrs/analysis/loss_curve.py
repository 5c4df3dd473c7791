"""Estimates of the noise and the descent of a recorded loss, for replays and simulations."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
_EXPONENTS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


def deviation(losses: ArrayLike, stretch: int = 40) -> float:
    """Return the standard deviation of single losses around piecewise linear fits, in nats.

    A line is fitted to every stretch to remove the descent, and the squared residuals of all stretches are
    pooled. A stretch with n finite losses has n - 2 degrees of freedom.

    Args:
        losses: Losses of consecutive steps; values that are not finite are ignored.
        stretch: Number of steps per line.

    Returns:
        The standard deviation, or NaN if no stretch has more than 2 finite losses.
    """
    values = np.asarray(losses, dtype=np.float64)
    squares, freedom = 0.0, 0
    for first in range(0, len(values), stretch):
        y = values[first : first + stretch]
        x = np.flatnonzero(np.isfinite(y)).astype(np.float64)
        if len(x) < 3:
            continue
        y = y[np.isfinite(y)] - y[np.isfinite(y)].mean()
        x -= x.mean()
        squares += float(y @ y - (x @ y) ** 2 / (x @ x))
        freedom += len(x) - 2
    return math.sqrt(max(squares, 0.0) / freedom) if freedom else math.nan


class Descent(NamedTuple):
    """Coefficients of L(u) = floor + drop * (1 + u / pace)^-exponent + heat * h, in nats.

    u is the progress, in steps at the best rate, and h the heat; see `megatron_adalrs.analysis.simulate`.
    """

    floor: float
    drop: float
    pace: float
    exponent: float
    heat: float


def fit_descent(losses: ArrayLike, progress: ArrayLike, warmth: ArrayLike) -> Descent:
    """Fit a `Descent` to a recorded loss by least squares.

    Pace and exponent are searched on a grid. For each pair the other coefficients are linear; if a
    coefficient is negative, the fit is repeated without the heat, and then without the floor. Losses are
    averaged in up to 200 blocks whose lengths grow in proportion to the step, so that the start of a run has
    as much weight as its end.

    Args:
        losses: One loss per step.
        progress: Value of u before each step.
        warmth: Value of h before each step.

    Raises:
        ValueError: If there are fewer than 8 blocks with finite losses, or the loss does not fall.
    """
    values = np.asarray(losses, dtype=np.float64)
    blocks = _blocks(len(values))
    y, u, h = (
        np.array([_mean(np.asarray(series, dtype=np.float64)[one], values[one]) for one in blocks])
        for series in (values, progress, warmth)
    )
    known = np.isfinite(y)
    y, u, h = y[known], u[known], h[known]
    if len(y) < 8:
        raise ValueError(f"{len(values)} losses are too few to fit a descent")
    if y[: len(y) // 4].mean() <= y[-(len(y) // 4) :].mean():
        raise ValueError("the loss does not fall: there is no descent to fit")
    best = (math.inf, Descent(0.0, 0.0, 1.0, 1.0, 0.0))
    for pace in np.geomspace(1.0, max(2.0, 3 * float(u[-1])), 40):
        for exponent in _EXPONENTS:
            curve = (1 + u / pace) ** -exponent
            for columns in ((np.ones_like(y), curve, h), (np.ones_like(y), curve), (curve,)):
                matrix = np.stack(columns, axis=1)
                weights, *_ = np.linalg.lstsq(matrix, y, rcond=None)
                if (weights < 0).any():
                    continue
                misfit = float(((matrix @ weights - y) ** 2).sum())
                if misfit < best[0]:
                    floor, drop, heat = (0.0, weights[0], 0.0) if len(weights) == 1 else (*weights, 0.0)[:3]
                    best = misfit, Descent(float(floor), float(drop), float(pace), exponent, float(heat))
                break
    return best[1]


def _blocks(length: int) -> list[slice]:
    edges = np.unique(np.round(np.geomspace(1, length + 1, 200)).astype(int)) - 1
    return [slice(first, last) for first, last in pairwise(edges.tolist())]


def _mean(series: Floats, where_finite: Floats) -> float:
    finite = np.isfinite(where_finite)
    return float(series[finite].mean()) if finite.any() else math.nan
