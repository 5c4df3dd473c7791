"""GPT: GPT-2, Llama and Qwen2 shapes from one set of parts.

Shapes: b = micro batch, s = sequence, h = hidden size, n = query heads, g = key-value heads, d = head size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.parallel.cross_entropy import linear_cross_entropy


class Attention(nn.Module):
    """Causal self-attention with grouped queries; one projection makes [q heads | k heads | v heads]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.dropout = config.attention_dropout
        width = (self.heads + 2 * self.groups) * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, width, bias=config.has_qkv_bias)
        self.output = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (
            self.qkv(x)
            .view(b, s, -1, self.head_dim)
            .transpose(1, 2)
            .split([self.heads, self.groups, self.groups], dim=1)
        )  # [b, n | g | g, s, d]
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        if self.groups != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))  # [b, n, s, d]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.output(y.transpose(1, 2).reshape(b, s, -1))


class MLP(nn.Module):
    """GELU (tanh form, as GPT-2), or with `swiglu` silu(gate) * up; one projection makes [gate | up]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.swiglu
        self.input = nn.Linear(config.hidden_size, config.mlp_size * (1 + self.gated), bias=config.add_bias_linear)
        self.output = nn.Linear(config.mlp_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)  # [b, s, ffn or 2 ffn]
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.output(F.silu(gate) * up)
        return self.output(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.attention_norm, self.attention = norm(config), Attention(config)
        self.mlp_norm, self.mlp = norm(config), MLP(config)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        x = x + F.dropout(self.attention(self.attention_norm(x), rotary), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)


class Rotary(nn.Module):
    """Rotary positions (arXiv 2104.09864) in the half-split layout of Llama and Qwen2: pairs are (i, i + d/2)."""

    def __init__(self, head_dim: int, max_positions: int, base: float) -> None:
        super().__init__()
        frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)  # [d/2]
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies).repeat(1, 2)  # [s, d]
        sign = torch.ones(head_dim)
        sign[: head_dim // 2] = -1.0
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("signed_sin", angles.sin() * sign, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, heads, s, d] -> the same shape, rotated."""
        s, half = x.shape[-2], x.shape[-1] // 2
        cos, signed_sin = (table[:s].to(x.dtype) for table in (self.cos, self.signed_sin))
        return x * cos + x.roll(half, dims=-1) * signed_sin


class Embedding(nn.Module):
    """Token embedding, plus learned positions where the shape has them."""

    def __init__(self, config: ModelConfig, padded_vocab_size: int) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.tokens = nn.Embedding(padded_vocab_size, config.hidden_size)
        self.positions = None
        if config.position_embedding_type == "learned_absolute":
            self.positions = nn.Embedding(config.max_positions, config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)  # [b, s, h]
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return F.dropout(x, self.dropout, self.training)


class GPT(nn.Module):
    """A decoder-only language model.

    Args:
        config: the shape.
        padded_vocab_size: rows of the embedding; at least the tokenizer's vocabulary.
    """

    def __init__(self, config: ModelConfig, padded_vocab_size: int) -> None:
        super().__init__()
        self.embedding = Embedding(config, padded_vocab_size)
        self.rotary = None
        if config.position_embedding_type == "rope":
            self.rotary = Rotary(config.head_dim, config.max_positions, config.rotary_base)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = norm(config)
        self.output = None
        if config.untie_embeddings_and_output_weights:
            self.output = nn.Linear(config.hidden_size, padded_vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean next-token loss. tokens: [b, s + 1], int64; the last column is only a target."""
        x = self.hidden(tokens[:, :-1])
        return linear_cross_entropy(x.flatten(0, 1), self.output_weight, tokens[:, 1:].flatten())

    def hidden(self, tokens: Tensor) -> Tensor:
        """Final hidden states [b, s, h] of tokens [b, s]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotary)
        return self.final_norm(x)

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits [b, s, padded vocabulary] of tokens [b, s]."""
        return self.hidden(tokens) @ self.output_weight.t()

    @property
    def output_weight(self) -> Tensor:
        """[padded vocabulary, h]."""
        return self.embedding.tokens.weight if self.output is None else self.output.weight


def norm(config: ModelConfig) -> nn.Module:
    kind = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_epsilon)


@torch.no_grad()
def initialise(
    model: GPT,
    config: ModelConfig,
    seed: int,
    whole: Callable[[nn.Parameter], AbstractContextManager[object]] = nullcontext,
) -> None:
    """GPT-2's initial weights: normal(0, std), residual projections normal(0, std / sqrt(2 layers)), biases 0, norms 1.

    Every parameter draws from a generator of its own, seeded by (seed, name): its values do not depend on which other
    parameters a process holds.

    Args:
        whole: context in which a parameter has its full shape and can be written; ZeRO-3 gathers it there.
    """
    residual_std = config.init_method_std / math.sqrt(2 * config.num_layers)
    for name, parameter in model.named_parameters():
        with whole(parameter):
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            is_residual = name.endswith(("attention.output.weight", "mlp.output.weight"))
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            values = torch.empty(parameter.shape, dtype=torch.float32)
            values.normal_(0.0, residual_std if is_residual else config.init_method_std, generator=generator)
            parameter.copy_(values)


def count_parameters(config: ModelConfig, padded_vocab_size: int) -> int:
    """Parameters of the model, counted on torch's meta device: nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config, padded_vocab_size).parameters())


def flops_per_token(config: ModelConfig, parameters: int, padded_vocab_size: int) -> float:
    """Floating-point operations of training on one token, forward and backward, recomputation not counted.

    6 per weight in a matrix product, plus 12 layers x heads x head size x sequence for attention scores and values
    (PaLM, arXiv 2204.02311, appendix B). Look-up tables do no work, a tied output matrix does.
    """
    idle = config.max_positions * config.hidden_size if config.position_embedding_type == "learned_absolute" else 0
    if config.untie_embeddings_and_output_weights:
        idle += padded_vocab_size * config.hidden_size
    attention = 12 * config.num_layers * config.num_attention_heads * config.head_dim * config.seq_length
    return 6.0 * (parameters - idle) + attention
