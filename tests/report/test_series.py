from __future__ import annotations

import numpy as np
import pytest

from megatron_adalrs.report.series import running_mean, smoothing_window, thin


@pytest.mark.parametrize("size", [2001, 10_000, 100_001])
def test_thinning_keeps_extremes_ends_and_order(size: int) -> None:
    random = np.random.default_rng(0)
    x, y = np.arange(size), random.normal(size=size)
    y[size // 3], y[size // 2] = 100.0, -100.0
    thin_x, thin_y = thin(x, y)

    assert thin_y.size <= 2000
    assert (np.diff(thin_x) > 0).all()
    assert {0, size // 3, size // 2, size - 1} <= set(thin_x.tolist())
    assert (y[thin_x] == thin_y).all()


def test_thinning_keeps_the_extremes_of_every_stretch() -> None:
    y = np.random.default_rng(0).normal(size=50_000)
    thin_x, thin_y = thin(np.arange(y.size), y)

    for low in range(0, y.size, 1000):
        inside = (thin_x >= low) & (thin_x < low + 1000)
        assert thin_y[inside].max() == y[low : low + 1000].max()
        assert thin_y[inside].min() == y[low : low + 1000].min()


def test_thinning_keeps_gaps() -> None:
    y = np.ones(10_000)
    y[5000:5010], y[7000] = np.nan, np.inf
    thin_x, thin_y = thin(np.arange(y.size), y)

    assert thin_y.size <= 2000
    assert np.isnan(thin_y[(thin_x >= 5000) & (thin_x < 5010)]).any()
    assert np.isinf(thin_y[thin_x == 7000]).all()


def test_thinning_leaves_a_short_series_alone() -> None:
    x, y = np.arange(2000), np.random.default_rng(0).normal(size=2000)
    thin_x, thin_y = thin(x, y)

    assert (thin_x == x).all() and (thin_y == y).all()


def test_running_mean_matches_its_definition() -> None:
    y = np.random.default_rng(0).normal(size=50)
    y[10], y[20] = np.nan, np.inf
    mean = running_mean(y, 5)

    for index in range(50):
        around = y[max(0, index - 2) : index + 3]
        expected = around[np.isfinite(around)].mean() if np.isfinite(y[index]) else np.nan
        assert mean[index] == pytest.approx(expected, nan_ok=True)


def test_short_curves_are_not_smoothed() -> None:
    assert smoothing_window(199) == 1
    assert smoothing_window(2000) == 20
