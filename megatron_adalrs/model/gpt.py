"""GPT: GPT-2, Llama and Qwen2 shapes from one set of parts.

Shapes: b = micro batch, s = sequence, h = hidden size, n = query heads, g = key-value heads, d = head size. Along a
tensor axis n, g, the MLP's width and the vocabulary are those of one rank, which holds an equal part of each; with
sequence parallelism the residual stream is [b, s / axis, h]. Key-value heads are not replicated: the number of tensor
ranks divides theirs.
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
from megatron_adalrs.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
    VocabularyParallelEmbedding,
    shard_of,
)
from megatron_adalrs.parallel.mappings import SEQUENCE, copy, gather, gather_sequence, scatter
from megatron_adalrs.parallel.random import dropout, own_stream
from megatron_adalrs.parallel.topology import ONE_PROCESS, ONE_RANK, Axis, Grid

VOCABULARY_TABLES = ("embedding.tokens.weight", "output.weight")


class Attention(nn.Module):
    """Causal self-attention with grouped queries; one projection makes [q heads | k heads | v heads]."""

    def __init__(self, config: ModelConfig, axis: Axis = ONE_RANK, sequence_parallel: bool = False) -> None:
        super().__init__()
        self.axis, self.head_dim, self.dropout = axis, config.head_dim, config.attention_dropout
        self.heads, self.groups = config.num_attention_heads // axis.size, config.num_key_value_heads // axis.size
        q, kv = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        hidden, along = config.hidden_size, (axis, sequence_parallel)
        self.qkv = ColumnParallelLinear(hidden, (q, kv, kv), config.has_qkv_bias, *along)
        self.output = RowParallelLinear(q, hidden, config.add_bias_linear, *along)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [b, n + 2 g, s, d]
        q, k, v = heads.split([self.heads, self.groups, self.groups], dim=1)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        if self.groups != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))  # [b, n, s, d]
        drop = self.dropout if self.training else 0.0
        with own_stream(self.axis) if drop else nullcontext():
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=drop)
        return self.output(y.transpose(1, 2).flatten(2))  # [b, s, n d]


class MLP(nn.Module):
    """GELU (tanh form, as GPT-2), or with `swiglu` silu(gate) * up; one projection makes [gate | up]."""

    def __init__(self, config: ModelConfig, axis: Axis = ONE_RANK, sequence_parallel: bool = False) -> None:
        super().__init__()
        self.gated = config.swiglu
        hidden, width, along = config.hidden_size, config.mlp_size, (axis, sequence_parallel)
        self.input = ColumnParallelLinear(hidden, (width,) * (1 + self.gated), config.add_bias_linear, *along)
        self.output = RowParallelLinear(width, hidden, config.add_bias_linear, *along)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)  # [b, s, ffn or 2 ffn]
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.output(F.silu(gate) * up)
        return self.output(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, axis: Axis = ONE_RANK, sequence_parallel: bool = False) -> None:
        super().__init__()
        along = (axis, sequence_parallel)
        self.attention_norm, self.attention = norm(config, *along), Attention(config, *along)
        self.mlp_norm, self.mlp = norm(config, *along), MLP(config, *along)
        self.dropout = HiddenDropout(config, *along)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class HiddenDropout(nn.Module):
    """Dropout in the residual stream: the same on all tensor ranks, which hold copies of it, unless they split it."""

    def __init__(self, config: ModelConfig, axis: Axis = ONE_RANK, sequence_parallel: bool = False) -> None:
        super().__init__()
        self.p, self.split_over = config.hidden_dropout, axis if sequence_parallel else ONE_RANK

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training, self.split_over)


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

    def __init__(
        self, config: ModelConfig, padded_vocab_size: int, axis: Axis = ONE_RANK, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self.axis = axis
        learned = config.position_embedding_type == "learned_absolute"
        # Positions are added to the whole sequence, which is split afterwards.
        self.splits = sequence_parallel and learned
        self.tokens = VocabularyParallelEmbedding(
            padded_vocab_size, config.hidden_size, axis, sequence_parallel and not learned
        )
        self.positions = nn.Embedding(config.max_positions, config.hidden_size) if learned else None
        self.dropout = HiddenDropout(config, axis, sequence_parallel)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)  # [b, s, h]
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        if self.splits:
            x = scatter(x, self.axis, SEQUENCE)
        return self.dropout(x)


class GPT(nn.Module):
    """A decoder-only language model, or one tensor rank's part of it.

    Args:
        config: the shape.
        vocab_size: tokens that there are; the tables have padding rows beyond, which never count.
        grid: place of this process; the default holds the whole model.
        sequence_parallel: split the residual stream along the sequence over the tensor axis.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, grid: Grid = ONE_PROCESS, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self.vocab_size, self.axis, self.sequence_parallel = vocab_size, grid.tensor, sequence_parallel
        padded_vocab_size, along = config.padded_vocab_size(vocab_size, self.axis.size), (self.axis, sequence_parallel)
        self.embedding = Embedding(config, padded_vocab_size, *along)
        self.rotary = None
        if config.position_embedding_type == "rope":
            self.rotary = Rotary(config.head_dim, config.max_positions, config.rotary_base)
        self.blocks = nn.ModuleList(Block(config, *along) for _ in range(config.num_layers))
        self.final_norm = norm(config, *along)
        self.output = None
        if config.untie_embeddings_and_output_weights:
            self.output = ColumnParallelLinear(config.hidden_size, padded_vocab_size, False, *along)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean next-token loss. tokens: [b, s + 1], int64; the last column is only a target."""
        x = self._whole_sequence(self.hidden(tokens[:, :-1])).flatten(0, 1)
        return linear_cross_entropy(x, self.output_weight, tokens[:, 1:].flatten(), self.vocab_size, self.axis)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Final hidden states [b, s, h] of tokens [b, s]; with sequence parallelism [b, s / axis, h]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotary)
        return self.final_norm(x)

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits [b, s, vocabulary] of tokens [b, s], on every rank."""
        mine = self._whole_sequence(self.hidden(tokens)) @ self.output_weight.t()
        return gather(mine, self.axis, dim=-1)[..., : self.vocab_size]

    @property
    def output_weight(self) -> Tensor:
        """[padded vocabulary / axis, h]."""
        return self.embedding.tokens.weight if self.output is None else self.output.weight

    def _whole_sequence(self, x: Tensor) -> Tensor:
        """Into the output projection: [b, s, h], whose gradients from the ranks' parts of the vocabulary add up."""
        return gather_sequence(x, self.axis) if self.sequence_parallel else copy(x, self.axis)


def norm(config: ModelConfig, axis: Axis = ONE_RANK, sequence_parallel: bool = False) -> nn.Module:
    is_rms, arguments = config.normalization == "RMSNorm", (config.hidden_size, config.norm_epsilon)
    if sequence_parallel:
        return (SequenceParallelRMSNorm if is_rms else SequenceParallelLayerNorm)(*arguments, axis)
    return (nn.RMSNorm if is_rms else nn.LayerNorm)(*arguments)


@torch.no_grad()
def initialise(
    model: nn.Module,
    config: ModelConfig,
    seed: int,
    whole: Callable[[nn.Parameter], AbstractContextManager[object]] = nullcontext,
) -> None:
    """GPT-2's initial weights: normal(0, std), residual projections normal(0, std / sqrt(2 layers)), biases 0, norms 1.

    Every parameter draws from a generator of its own, seeded by (seed, name), and a rank takes its part of the whole:
    the weights depend neither on the grid nor on which other parameters a process holds. Padding rows are 0.

    Args:
        model: a GPT, or a stage's layers arranged as one, with its `vocab_size`.
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
            shard = shard_of(parameter)
            values = torch.zeros(shard.whole_shape(parameter.shape) if shard else parameter.shape)
            drawn = values[: model.vocab_size] if name in VOCABULARY_TABLES else values
            drawn.normal_(0.0, residual_std if is_residual else config.init_method_std, generator=generator)
            parameter.copy_(shard.of(values) if shard else values)


def count_parameters(config: ModelConfig, vocab_size: int, grid: Grid = ONE_PROCESS) -> int:
    """Parameters that this process holds, counted on torch's meta device: nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config, vocab_size, grid).parameters())


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
