"""Configuration of the model's shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_adalrs.config.base import Fraction, Group, require, shown_division

PresetName = Literal[
    "gpt2-tiny",
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "llama-tiny",
    "llama3.2-1b",
    "llama3.2-3b",
    "llama3.1-8b",
    "qwen2-tiny",
    "qwen2.5-0.5b",
    "qwen2.5-1.5b",
    "qwen2.5-3b",
    "qwen2.5-7b",
]


@dataclass(frozen=True)
class RopeScaling:
    """Parameters of Llama 3.1's scaling of rotary positions, named as in its config.json.

    `model/rotary_embedding.py` has the formula.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class ModelConfig(Group):
    """Model shape."""

    preset: PresetName | None = None
    """Published shape, or a tiny one of the same family, that sets the defaults of the fields below."""
    num_layers: PositiveInt
    """Number of transformer blocks."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_attention_heads: PositiveInt
    """Number of query heads."""
    num_query_groups: PositiveInt | None = None
    """Number of key-value heads (grouped-query attention). Default: num_attention_heads."""
    kv_channels: PositiveInt | None = None
    """Size of one head. Default: hidden_size / num_attention_heads."""
    ffn_hidden_size: PositiveInt | None = None
    """Hidden width of the MLP. Default: 4 * hidden_size; with swiglu, 8/3 * hidden_size rounded down to a
    multiple of 64."""
    seq_length: PositiveInt
    """Tokens per sample."""
    max_position_embeddings: PositiveInt | None = None
    """Longest sequence: size of the learned position table, or, for rotary positions, the limit in exports
    and inference. At least seq_length. Default: seq_length."""
    vocab_size: PositiveInt | None = None
    """Vocabulary size before padding. Default: that of the tokenizer, else that recorded with the data."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """Pad the vocabulary to a multiple of this number."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Type of the normalization layers."""
    norm_epsilon: PositiveFloat = 1e-5
    """Epsilon of the normalization layers."""
    position_embedding_type: Literal["learned_absolute", "rope"] = "learned_absolute"
    """Learned absolute positions, or rotary positions applied to queries and keys."""
    rotary_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    use_rope_scaling: bool = False
    """Scale rotary positions as Llama 3.1 does: low frequencies are divided by a factor."""
    rope_scaling_factor: Annotated[float, Field(ge=1)] = 8.0
    """Divisor of frequencies with fewer than rope_scaling_low_freq_factor turns in the original length. Llama
    3.2 uses 32."""
    rope_scaling_low_freq_factor: PositiveFloat = 1.0
    """Turns in the original length below which a frequency is divided by the full factor."""
    rope_scaling_high_freq_factor: PositiveFloat = 4.0
    """Turns in the original length above which a frequency is not changed."""
    rope_scaling_original_max_position_embeddings: PositiveInt = 8192
    """Original length: tokens per sequence before rotary positions were scaled."""
    swiglu: bool = False
    """Use a gated SiLU in the MLP instead of GELU."""
    add_bias_linear: bool = True
    """Use biases in the linear layers: attention output and MLP, and also q, k and v unless add_qkv_bias is
    set."""
    add_qkv_bias: bool | None = None
    """Use biases in the q, k and v projections. Qwen2 has no others. Default: add_bias_linear."""
    untie_embeddings_and_output_weights: bool = False
    """Use a separate output matrix instead of the transposed token embedding."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; for residual projections it is divided by
    sqrt(2 * num_layers)."""
    attention_dropout: Fraction = 0.0
    """Dropout on attention probabilities."""
    hidden_dropout: Fraction = 0.0
    """Dropout on the embeddings and on each residual branch."""

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Number of key-value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        return max(64, self.hidden_size * 8 // 3 // 64 * 64) if self.swiglu else 4 * self.hidden_size

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the q, k and v projections have biases."""
        return self.add_bias_linear if self.add_qkv_bias is None else self.add_qkv_bias

    @property
    def max_positions(self) -> int:
        """Longest sequence in tokens."""
        if self.position_embedding_type == "rope":
            return max(self.max_position_embeddings or 0, self.seq_length)
        return self.max_position_embeddings or self.seq_length

    @property
    def rope_scaling(self) -> RopeScaling | None:
        """Scaling of rotary positions; None if they are not scaled."""
        if not self.use_rope_scaling:
            return None
        return RopeScaling(
            self.rope_scaling_factor,
            self.rope_scaling_low_freq_factor,
            self.rope_scaling_high_freq_factor,
            self.rope_scaling_original_max_position_embeddings,
        )

    def padded_vocab_size(self, vocab_size: int, tensor_parallel_size: int = 1) -> int:
        """Round `vocab_size` up to a multiple of make_vocab_size_divisible_by x tensor ranks.

        Megatron-LM pads in the same way.
        """
        multiple = self.make_vocab_size_divisible_by * tensor_parallel_size
        return math.ceil(vocab_size / multiple) * multiple

    @model_validator(mode="after")
    def _sizes_divide(self) -> ModelConfig:
        require(
            bool(self.kv_channels) or self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size: {self.hidden_size} is not divisible by num_attention_heads: "
            f"{shown_division(self.hidden_size, self.num_attention_heads)}; change one of them, or give "
            f"kv_channels",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_query_groups: {self.num_key_value_heads} does not divide num_attention_heads: "
            f"{shown_division(self.num_attention_heads, self.num_key_value_heads)}",
        )
        require(
            self.position_embedding_type != "rope" or self.head_dim % 2 == 0,
            f"kv_channels: rotary positions rotate pairs, so the head size must be even, not {self.head_dim}",
        )
        require(
            self.max_positions >= self.seq_length,
            f"max_position_embeddings: {self.max_positions} is below seq_length {self.seq_length}",
        )
        return self

    @model_validator(mode="after")
    def _rope_scaling_is_possible(self) -> ModelConfig:
        require(
            not self.use_rope_scaling or self.position_embedding_type == "rope",
            f"use_rope_scaling: True: only rotary positions are scaled, required position_embedding_type "
            f"rope, not {self.position_embedding_type}",
        )
        low, high = self.rope_scaling_low_freq_factor, self.rope_scaling_high_freq_factor
        require(
            low < high,
            f"rope_scaling_low_freq_factor: {low}: required below rope_scaling_high_freq_factor, {high}",
        )
        return self
