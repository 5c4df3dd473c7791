"""Rotary embedding against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_adalrs.config.model import RopeScaling
from megatron_adalrs.model.rotary_embedding import Rotary, scale_frequencies

LLAMA31 = RopeScaling(8.0, 1.0, 4.0, 8192)


def test_rotary_depends_on_distances_only() -> None:
    rotary = Rotary(head_dim=8, positions=32, base=10000.0)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, generator=generator).expand(1, 1, 32, 8) for _ in range(2))
    scores = rotary(q) @ rotary(k).transpose(-1, -2)
    assert torch.allclose(scores[0, 0, 5, 3], scores[0, 0, 20, 18], atol=1e-5)
    assert not torch.allclose(scores[0, 0, 5, 3], scores[0, 0, 5, 2], atol=1e-3)


def test_rotary_rotates_by_the_published_angles() -> None:
    rotary = Rotary(head_dim=4, positions=3, base=100.0)
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 1, 3, 4)
    assert torch.allclose(rotary(x)[0, 0, 2], torch.tensor([math.cos(2.0), 0.0, math.sin(2.0), 0.0]))
    x = torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(1, 1, 3, 4)
    assert torch.allclose(rotary(x)[0, 0, 2], torch.tensor([0.0, math.cos(0.2), 0.0, math.sin(0.2)]))


def reference(frequency: float, scaling: RopeScaling) -> float:
    """Meta's reference, branch by branch."""
    original, wavelength = scaling.original_max_position_embeddings, 2 * math.pi / frequency
    if wavelength < original / scaling.high_freq_factor:
        return frequency
    if wavelength > original / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


@pytest.mark.parametrize(
    "scaling", [LLAMA31, RopeScaling(32.0, 1.0, 4.0, 8192), RopeScaling(3.0, 0.5, 9.0, 100)]
)
def test_frequencies_are_scaled_as_by_the_reference(scaling: RopeScaling) -> None:
    frequencies = torch.logspace(0, -6, 200, dtype=torch.float64)
    expected = torch.tensor([reference(one, scaling) for one in frequencies.tolist()], dtype=torch.float64)
    torch.testing.assert_close(scale_frequencies(frequencies, scaling), expected, rtol=1e-12, atol=0)
    blended = (expected < frequencies * 0.999) & (expected > frequencies / scaling.factor * 1.001)
    assert 10 < blended.sum() < 100, "not all of the branches were tried"


def test_only_low_frequencies_are_divided() -> None:
    turns = torch.tensor([400.0, 4.0, 2.5, 1.0, 0.01])  # within the original length
    frequencies = turns * 2 * math.pi / 8192
    assert (scale_frequencies(frequencies, LLAMA31) / frequencies).tolist() == pytest.approx(
        [1, 1, 0.5 + 0.5 / 8, 1 / 8, 1 / 8]
    )


def test_scaled_positions_are_rotated_by_scaled_angles() -> None:
    # The second pair turns once in 200 pi tokens, less than once in 100: a quarter of its angle is left.
    scaling = RopeScaling(4.0, 1.0, 4.0, 100)
    rotary, plain = (Rotary(head_dim=4, positions=9, base=1e4, scaling=one) for one in (scaling, None))
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 9, 4)
    assert torch.allclose(rotary(x)[0, 0, 8, 1::2], plain(x)[0, 0, 2, 1::2])
    assert torch.allclose(rotary(x)[0, 0, 8, 0::2], plain(x)[0, 0, 8, 0::2])
