"""Seeds that every random generator accepts."""

from __future__ import annotations

import pytest

from tests.helpers.runs import tiny_config


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed: {seed}: input should be"):
        tiny_config(seed=seed)


def test_the_largest_seed_is_accepted() -> None:
    assert tiny_config(seed=2**63 - 1).training.seed == 2**63 - 1
