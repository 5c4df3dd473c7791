from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_adalrs.data.blend_order import WINDOW, BlendOrder

SIZES = st.lists(st.floats(min_value=0, max_value=1e6, exclude_min=True), min_size=1, max_size=8)


def shares_of(sizes: list[float]) -> list[Fraction]:
    exact = [Fraction(size) for size in sizes]
    return [size / sum(exact) for size in exact]


def corpora(order: BlendOrder, first: int, count: int) -> np.ndarray:
    return np.array([order.locate(number)[0] for number in range(first, first + count)])


@settings(max_examples=25, deadline=None)
@given(SIZES, st.integers(0, 2_000_000))
@example([1 / 3, 1 / 7, 11 / 21], 0)
@example([1e-6, 1.0, 1e6], 999_000)
@example([1.0] * 7, 0)
def test_any_window_is_within_one_sample_of_the_shares(sizes: list[float], first: int) -> None:
    shares = shares_of(sizes)
    order = BlendOrder(shares, first + 3 * WINDOW)
    for begin in range(first, first + 2 * WINDOW, 97):
        ends = order.counts(begin), order.counts(begin + WINDOW)
        for share, before, after in zip(shares, *ends, strict=True):
            assert abs(after - before - share * WINDOW) < 1


@settings(max_examples=25, deadline=None)
@given(SIZES, st.integers(0, 2_000_000))
def test_samples_of_a_corpus_are_counted_without_gaps(sizes: list[float], first: int) -> None:
    order = BlendOrder(shares_of(sizes), first + 300)
    counts = order.counts(first)
    assert sum(counts) == first
    for number in range(first, first + 300):
        corpus, sample = order.locate(number)
        assert sample == counts[corpus]
        counts[corpus] += 1
        assert order.counts(number + 1) == counts


@settings(max_examples=10, deadline=None)
@given(SIZES, st.integers(1, 10**7))
def test_no_corpus_falls_behind_in_the_long_run(sizes: list[float], length: int) -> None:
    shares = shares_of(sizes)
    for count, share in zip(BlendOrder(shares, length).counts(length), shares, strict=True):
        assert abs(count - share * length) < 1 + len(shares)


def test_more_samples_continue_the_order_of_fewer() -> None:
    shares = shares_of([0.2, 0.33, 0.5, 0.071])
    short, long = BlendOrder(shares, 25_000), BlendOrder(shares, 900_000)
    assert [short.locate(n) for n in range(25_000)] == [long.locate(n) for n in range(25_000)]


def test_small_runs_are_blended_evenly_too() -> None:
    served = corpora(BlendOrder(shares_of([7.0, 3.0]), 20), 0, 20)
    for n in range(1, 21):
        assert abs((served[:n] == 1).sum() - 0.3 * n) < 1
