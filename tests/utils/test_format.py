from __future__ import annotations

import math

import pytest

from megatron_adalrs.utils import format as fmt


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (8_192_000, "8.19 MB"),
        (512_000, "512 kB"),
        (81_900, "81.9 kB"),
        (12, "12 B"),
        (2.1e11, "210 GB"),
        (999_950, "1 MB"),
        (0, "0 B"),
        (999, "999 B"),
        (12345, "12.3 kB"),
        (2.5e9, "2.5 GB"),
        (3e15, "3 PB"),
        (math.nan, "–"),
    ],
)
def test_quantity(value: float, written: str) -> None:
    assert fmt.quantity(value, "B") == written


@pytest.mark.parametrize(
    ("value", "written"), [(1e-4, "1e-4"), (6.75e-4, "6.75e-4"), (0.0, "0"), (2.5, "2.5e0")]
)
def test_scientific(value: float, written: str) -> None:
    assert fmt.scientific(value) == written


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0.26, "0.26s"),
        (5, "5s"),
        (59, "59s"),
        (59.6, "1m 00s"),
        (106.2, "1m 46s"),
        (249, "4m 09s"),
        (7325, "2h 02m"),
        (11100, "3h 05m"),
        (93600, "1d 02h"),
    ],
)
def test_duration(seconds: float, written: str) -> None:
    assert fmt.duration(seconds) == written


def test_velocity_is_per_1000_steps_with_two_errors() -> None:
    assert fmt.velocity(0.0142, 0.0004) == "0.0142 ± 0.0004"
    assert fmt.velocity(0.0142, None) == "0.0142"
    assert fmt.velocity(None, None) == fmt.velocity(math.nan, 0.1) == "–"


def test_a_gain_has_its_sign_and_twice_its_error() -> None:
    assert fmt.gain(0.01234, 0.001) == "+0.01234 ± 0.001"
    assert fmt.gain(-0.5, None) == "-0.5"


def test_perplexity_overflows_to_infinity() -> None:
    assert fmt.perplexity(1.0) == pytest.approx(math.e)
    assert fmt.perplexity(1e6) == math.inf
