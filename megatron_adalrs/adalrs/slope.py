"""Least-squares slope of a series that is given one value at a time, in constant memory."""

from __future__ import annotations

import math


class RunningSlope:
    """Ordinary least squares of y_0, y_1, ... on their index 0, 1, ..., in O(1) time and memory a value.

    For equally spaced abscissae the recursive least-squares update (Plackett 1950, "Some theorems in least
    squares") has closed-form gains. With n values seen, their mean m, slope b and residual sum of squares r,
    a new value y gives

        d  = y - m - b * (n + 1) / 2                     the error of predicting y from the line so far
        m += (y - m) / (n + 1)
        b += d * 6 / ((n + 1) * (n + 2))
        r += d**2 * n * (n - 1) / ((n + 1) * (n + 2))    recursive residual squared (Brown et al. 1975)

    The fractions follow from sum((i - (n - 1) / 2)**2) = n * (n**2 - 1) / 12. The residual sum grows by
    squares only, so nothing cancels however well the line fits; values are taken relative to the first one,
    so a large constant offset costs no accuracy.
    """

    __slots__ = ("_first", "_mean", "_residual", "_slope", "n")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Remove all values."""
        self.n = 0
        self._first = 0.0
        self._mean = 0.0
        self._slope = 0.0
        self._residual = 0.0

    def push(self, value: float) -> None:
        """Add the next value of the series."""
        n = self.n
        if n == 0:
            self._first = value
        value -= self._first
        surprise = value - self._mean - self._slope * (n + 1) / 2
        gain = 1 / ((n + 1) * (n + 2))
        self._mean += (value - self._mean) / (n + 1)
        self._slope += surprise * 6 * gain
        self._residual += surprise * surprise * (n * (n - 1) * gain)
        self.n = n + 1

    @property
    def mean(self) -> float:
        """Mean of the values; nan when there are none."""
        return self._first + self._mean if self.n else math.nan

    @property
    def slope(self) -> float:
        """Change of the fitted line per step; nan with fewer than 2 values."""
        return self._slope if self.n >= 2 else math.nan

    @property
    def error(self) -> float:
        """Standard error of the slope, sqrt(r / (n - 2) / sum((i - mean)**2)); nan below 3 values."""
        n = self.n
        if n < 3:
            return math.nan
        return math.sqrt(self._residual / (n - 2) / (n * (n * n - 1) / 12))

    def state_dict(self) -> dict[str, float]:
        """Return the whole state, as numbers that json writes and reads exactly."""
        return {name.lstrip("_"): getattr(self, name) for name in self.__slots__}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a state that `state_dict` returned."""
        for name in self.__slots__:
            setattr(self, name, state[name.lstrip("_")])
