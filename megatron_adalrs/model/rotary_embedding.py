"""Rotary positions (arXiv 2104.09864), as they are or with the frequencies of Llama 3.1."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.config.model import RopeScaling


class Rotary(nn.Module):
    """Rotary positions in the half-split layout of Llama and Qwen2: pairs are (i, i + d/2).

    Args:
        positions: how many there are, from 0 on.
        base: of the frequencies.
        scaling: None: they are left as they are.
    """

    def __init__(
        self, head_dim: int, positions: int, base: float, scaling: RopeScaling | None = None
    ) -> None:
        super().__init__()
        # To the bit those of transformers: a rounding more is a wrong angle ten thousands of positions away.
        frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # [d/2]
        if scaling is not None:
            frequencies = scaled(frequencies, scaling)
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies).repeat(1, 2)  # [s, d]
        sign = torch.ones(head_dim)
        sign[: head_dim // 2] = -1.0
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("signed_sin", angles.sin() * sign, persistent=False)

    @classmethod
    def of(cls, config: ModelConfig) -> Rotary | None:
        """What a model has; None: its positions are learned. For samples of its seq_length, however far it
        could go."""
        if config.position_embedding_type != "rope":
            return None
        return cls(config.head_dim, config.seq_length, config.rotary_base, config.rope_scaling)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x: [b, heads, s, d] -> the same shape, rotated. positions: [b, s], default 0 ... s - 1."""
        s, half = x.shape[-2], x.shape[-1] // 2
        places = (
            slice(s) if positions is None else positions.unsqueeze(1)
        )  # [b, 1, s]: the same for all heads
        cos, signed_sin = (table[places].to(x.dtype) for table in (self.cos, self.signed_sin))
        return x * cos + x.roll(half, dims=-1) * signed_sin


def scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """The frequencies of Llama 3.1, in radians a token, of unscaled ones: slow ones are divided by the
    factor, so that angles beyond the original length are like those within it; fast ones, which tell
    neighbours apart, stay.

    Source: `apply_scaling` of Meta's reference (meta-llama/llama-models, models/llama3/model.py), "llama3" in
    transformers' modeling_rope_utils.py. Those have three branches, which are this one blend with its weight
    clamped.
    """
    turns = scaling.original_max_position_embeddings / (
        2 * math.pi / frequencies
    )  # within the original length
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies
