"""Model shape."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from megatron_adalrs.config.base import Fraction, Group, require, shown_division

PresetName = Literal[
    "gpt2-tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl",
    "llama-tiny", "llama3.2-1b", "llama3.2-3b", "llama3.1-8b",
    "qwen2-tiny", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b",
]  # fmt: skip


class ModelConfig(Group):
    """Model shape."""

    preset: PresetName | None = None
    """A published shape, or a tiny one of its family, as defaults for the fields below."""
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
    """Width inside the MLP. Default: 4 hidden_size, with --swiglu 8/3 hidden_size rounded down to a multiple of 64."""
    seq_length: PositiveInt
    """Tokens in one sample."""
    max_position_embeddings: PositiveInt | None = None
    """Longest sequence that learned positions can represent. Default: seq_length."""
    vocab_size: PositiveInt | None = None
    """Vocabulary size before padding. Default: the tokenizer's, else the one noted beside the data."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The vocabulary is padded up to a multiple of this."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Kind of normalisation."""
    norm_epsilon: PositiveFloat = 1e-5
    """Epsilon inside the normalisation."""
    position_embedding_type: Literal["learned_absolute", "rope"] = "learned_absolute"
    """Learned absolute positions, or rotary ones applied to queries and keys."""
    rotary_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    swiglu: bool = False
    """Gated SiLU in the MLP in place of GELU."""
    add_bias_linear: bool = True
    """Biases on the linear layers (attention output and MLP; on q, k and v too unless add_qkv_bias says otherwise)."""
    add_qkv_bias: bool | None = None
    """Biases on q, k and v. Default: add_bias_linear. Qwen2 has these and no others."""
    untie_embeddings_and_output_weights: bool = False
    """A separate output matrix, instead of the transposed token embedding."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; residual projections get this / sqrt(2 num_layers)."""
    attention_dropout: Fraction = 0.0
    """Dropout on attention probabilities."""
    hidden_dropout: Fraction = 0.0
    """Dropout on the embeddings and on each residual branch."""

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def mlp_size(self) -> int:
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        return max(64, self.hidden_size * 8 // 3 // 64 * 64) if self.swiglu else 4 * self.hidden_size

    @property
    def has_qkv_bias(self) -> bool:
        return self.add_bias_linear if self.add_qkv_bias is None else self.add_qkv_bias

    @property
    def max_positions(self) -> int:
        return self.max_position_embeddings or self.seq_length

    def padded_vocab_size(self, vocab_size: int, tensor_parallel_size: int = 1) -> int:
        """`vocab_size` rounded up to a multiple of make_vocab_size_divisible_by x tensor ranks, as Megatron-LM does."""
        multiple = self.make_vocab_size_divisible_by * tensor_parallel_size
        return math.ceil(vocab_size / multiple) * multiple

    @model_validator(mode="after")
    def _sizes_divide(self) -> ModelConfig:
        require(
            bool(self.kv_channels) or self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size: {self.hidden_size} is not divisible by num_attention_heads: "
            f"{shown_division(self.hidden_size, self.num_attention_heads)}; change one of them, or give kv_channels",
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
