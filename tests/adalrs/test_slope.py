from __future__ import annotations

import json
import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adalrs.adalrs.slope import RunningSlope

losses = st.floats(-1e3, 1e3, allow_nan=False, width=32)


def fit(values: Iterable[float]) -> RunningSlope:
    running = RunningSlope()
    for value in values:
        running.push(float(value))
    return running


def exact_fit(values: Iterable[float]) -> tuple[float, float, float]:
    """Return mean, slope and standard error by the textbook sums, in rational arithmetic."""
    y = [Fraction(float(value)) for value in values]
    n = len(y)
    x_mean, y_mean = Fraction(n - 1, 2), sum(y) / n
    sxx = Fraction(n * (n * n - 1), 12)
    sxy = sum((i - x_mean) * (value - y_mean) for i, value in enumerate(y))
    syy = sum((value - y_mean) ** 2 for value in y)
    residual = syy - sxy * sxy / sxx
    return float(y_mean), float(sxy / sxx), math.sqrt(residual / (n - 2) / sxx)


@pytest.mark.parametrize("offset", [0.0, 3.0, 1e6])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.5])
def test_long_window_is_exact_to_nine_digits(offset: float, noise: float) -> None:
    steps = np.arange(10_000)
    random = np.random.default_rng(0)
    values = offset + 2.0 * np.exp(-steps / 4000) + noise * random.standard_normal(len(steps))
    running = fit(values)
    mean, slope, error = exact_fit(values)
    assert running.n == len(values)
    assert running.mean == pytest.approx(mean, rel=1e-9)
    assert running.slope == pytest.approx(slope, rel=1e-9)
    assert running.error == pytest.approx(error, rel=1e-9)


def test_slope_agrees_with_numpy() -> None:
    values = np.random.default_rng(1).standard_normal(500).cumsum()
    coefficients, covariance = np.polyfit(np.arange(500), values, 1, cov=True)
    running = fit(values)
    assert running.slope == pytest.approx(coefficients[0], rel=1e-9)
    assert running.error == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-9)


@given(
    seed=st.integers(0, 2**32),
    offset=st.sampled_from([0.0, 1e6, -1e6]),
    noise=st.sampled_from([1e-2, 0.2, 5.0]),
    fall=st.floats(-1e-3, 1e-3),
)
@settings(max_examples=20, deadline=None)
def test_long_window_equals_numpy_and_closed_form(
    seed: int, offset: float, noise: float, fall: float
) -> None:
    steps = np.arange(10_000)
    values = offset - fall * steps + noise * np.random.default_rng(seed).standard_normal(len(steps))
    running = fit(values)
    # b = sum(x y) / sum(x x) and e = sqrt(sum((y - b x)^2) / (n - 2) / sum(x x)) around the means. The offset
    # is subtracted, because sums of squares would lose precision with it.
    x, y = steps - steps.mean(), values - offset
    y = y - y.mean()
    slope = (x @ y) / (x @ x)
    error = math.sqrt(((y - slope * x) ** 2).sum() / (len(x) - 2) / (x @ x))
    assert running.slope == pytest.approx(slope, rel=1e-9, abs=1e-9 * error)
    assert running.error == pytest.approx(error, rel=1e-9)
    coefficients, covariance = np.polyfit(x, values - offset, 1, cov=True)
    assert running.slope == pytest.approx(coefficients[0], rel=1e-9, abs=1e-9 * error)
    assert running.error == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-9)


@given(st.lists(losses, min_size=3, max_size=40))
def test_slope_agrees_with_exact_arithmetic(values: list[float]) -> None:
    running = fit(values)
    mean, slope, error = exact_fit(values)
    spread = max(values) - min(values)
    assert running.mean == pytest.approx(mean, abs=1e-9 * (1 + abs(mean)))
    assert running.slope == pytest.approx(slope, abs=1e-12 * spread)
    assert running.error == pytest.approx(error, rel=1e-6, abs=1e-12 * spread)


def test_straight_line_has_no_error() -> None:
    running = fit([7.0 - 0.25 * i for i in range(100)])
    assert running.slope == -0.25
    assert running.error == 0.0


def test_unknown_quantities_are_nan() -> None:
    assert math.isnan(fit([]).mean)
    assert math.isnan(fit([1.0]).slope)
    assert math.isnan(fit([1.0, 2.0]).error)
    assert fit([1.0, 2.0]).slope == 1.0


@given(st.lists(losses, max_size=20), st.lists(losses, max_size=20))
@settings(max_examples=50)
def test_saved_slope_continues_exactly(before: list[float], after: list[float]) -> None:
    straight = fit([*before, *after])
    saved = json.loads(json.dumps(fit(before).state_dict()))
    resumed = RunningSlope()
    resumed.load_state_dict(saved)
    for value in after:
        resumed.push(value)
    assert resumed.state_dict() == straight.state_dict()


def test_reset_removes_all_values() -> None:
    running = fit([5.0, 3.0, 9.0, 1.0])
    running.reset()
    assert running.state_dict() == RunningSlope().state_dict()
