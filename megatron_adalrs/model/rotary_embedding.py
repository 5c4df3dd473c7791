"""Rotary position embedding (arXiv 2104.09864), optionally with the frequencies of Llama 3.1."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.config.model import RopeScaling


class Rotary(nn.Module):
    """Rotary position embedding in the half-split layout of Llama and Qwen2: pairs are (i, i + d/2).

    Args:
        head_dim: size of a head, d.
        positions: number of positions of the table.
        base: base of the frequencies, base^(-2i/d).
        scaling: Llama 3.1's change of the frequencies, if any.
    """

    cos: Tensor
    signed_sin: Tensor

    def __init__(
        self, head_dim: int, positions: int, base: float, scaling: RopeScaling | None = None
    ) -> None:
        super().__init__()
        # Bit-identical to transformers: a rounding error here grows with the position.
        frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # [d/2]
        if scaling is not None:
            frequencies = scale_frequencies(frequencies, scaling)
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies).repeat(1, 2)  # [s, d]
        sign = torch.ones(head_dim)
        sign[: head_dim // 2] = -1.0
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("signed_sin", angles.sin() * sign, persistent=False)

    @classmethod
    def of(cls, config: ModelConfig) -> Rotary | None:
        """Return the table of a model for its `seq_length`; None if the model has no rotary embedding."""
        if config.position_embedding_type != "rope":
            return None
        return cls(config.head_dim, config.seq_length, config.rotary_base, config.rope_scaling)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotate queries or keys.

        Args:
            x: [b, heads, s, d].
            positions: [b, s], int64; None for 0 ... s - 1.

        Returns:
            The rotated tensor, of the same shape.
        """
        s, half = x.shape[-2], x.shape[-1] // 2
        # positions as [b, 1, s]: the same for all heads
        index = slice(s) if positions is None else positions.unsqueeze(1)
        cos, signed_sin = (table[index].to(x.dtype) for table in (self.cos, self.signed_sin))
        return x * cos + x.roll(half, dims=-1) * signed_sin


def scale_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Scale frequencies, in radians per token, as Llama 3.1 does to extend the context.

    Low frequencies are divided by the factor, so that the angles of a longer context stay in the original
    range. High frequencies, which distinguish neighbouring tokens, are kept.

    Source: `apply_scaling` of Meta's reference (meta-llama/llama-models, models/llama3/model.py), "llama3" in
    transformers' modeling_rope_utils.py. The three branches there equal one
    interpolation with a clamped weight.
    """
    # Turns within the original context length.
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies
