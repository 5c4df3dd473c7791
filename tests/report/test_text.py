from __future__ import annotations

import math

import pytest

from megatron_adalrs.report import text


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (8_192_000, "8.19 MB"),
        (512_000, "512 kB"),
        (81_900, "81.9 kB"),
        (12, "12 B"),
        (2.1e11, "210 GB"),
        (999_950, "1000 kB"),
        (math.nan, "–"),
    ],
)
def test_quantity(value: float, written: str) -> None:
    assert text.quantity(value, "B") == written


@pytest.mark.parametrize(
    ("value", "written"), [(1e-4, "1e-4"), (6.75e-4, "6.75e-4"), (0.0, "0"), (2.5, "2.5e0")]
)
def test_scientific(value: float, written: str) -> None:
    assert text.scientific(value) == written


@pytest.mark.parametrize(
    ("seconds", "written"), [(0.26, "0.26 s"), (59, "59 s"), (106.2, "1 min 46 s"), (7325, "2 h 02 min")]
)
def test_duration(seconds: float, written: str) -> None:
    assert text.duration(seconds) == written


def test_velocity_is_per_thousand_steps_with_two_errors() -> None:
    assert text.velocity(0.0142, 0.0004) == "14.2 ± 0.8"
    assert text.velocity(0.0142, None) == "14.2"
    assert text.velocity(None, None) == text.velocity(math.nan, 0.1) == "–"


def test_a_gain_has_its_sign_and_twice_its_error() -> None:
    assert text.gain(0.01234, 0.001) == "+0.01234 ± 0.002"
    assert text.gain(-0.5, None) == "-0.5"
