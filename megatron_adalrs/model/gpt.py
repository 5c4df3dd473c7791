"""GPT: GPT-2, Llama and Qwen2 shapes from one set of parts.

Shapes: b = micro batch, s = sequence, h = hidden size. Along a tensor axis the heads, the MLP's width and the
vocabulary are those of one rank, which holds an equal part of each; with sequence parallelism the residual
stream is [b, s / axis, h]. Along a context axis s is the rank's part of the sequence.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.distributed.process_mesh import ONE_RANK
from megatron_adalrs.model.attention import Attention
from megatron_adalrs.model.document_mask import (
    IGNORE_INDEX,
    NO_ATTENTION_INPUTS,
    NO_DOCUMENT_MASKING,
    AttentionInputs,
    DocumentMasking,
)
from megatron_adalrs.model.rotary_embedding import Rotary
from megatron_adalrs.parallel.activation_checkpointing import recomputed
from megatron_adalrs.parallel.context_parallel import part_of_sequence
from megatron_adalrs.parallel.cross_entropy import linear_cross_entropy
from megatron_adalrs.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
    VocabularyParallelEmbedding,
    shard_of,
)
from megatron_adalrs.parallel.layout import ONE_PROCESS_LAYOUT, Layout
from megatron_adalrs.parallel.mappings import SEQUENCE, copy, gather, gather_sequence, scatter
from megatron_adalrs.parallel.random import dropout

VOCABULARY_TABLES = ("embedding.tokens.weight", "output.weight")


class MLP(nn.Module):
    """GELU (tanh form, as GPT-2), or with `swiglu` silu(gate) * up; one projection makes [gate | up]."""

    def __init__(self, config: ModelConfig, layout: Layout = ONE_PROCESS_LAYOUT) -> None:
        super().__init__()
        self.gated = config.swiglu
        hidden, width = config.hidden_size, config.mlp_size
        self.input = ColumnParallelLinear(hidden, (width,) * (1 + self.gated), config.add_bias_linear, layout)
        self.output = RowParallelLinear(width, hidden, config.add_bias_linear, layout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)  # [b, s, ffn or 2 ffn]
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.output(F.silu(gate) * up)
        return self.output(F.gelu(x, approximate="tanh"))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, layout: Layout = ONE_PROCESS_LAYOUT) -> None:
        super().__init__()
        self.recompute = layout.recompute == "full"
        self.attention_norm, self.attention = norm(config, layout), Attention(config, layout)
        self.mlp_norm, self.mlp = norm(config, layout), MLP(config, layout)
        self.dropout = HiddenDropout(config, layout)

    def forward(
        self, x: Tensor, rotary: Rotary | None, marks: AttentionInputs = NO_ATTENTION_INPUTS
    ) -> Tensor:
        """x: [b, s, h] -> the same shape."""
        return (
            recomputed(self._forward, x, rotary, marks) if self.recompute else self._forward(x, rotary, marks)
        )

    def _forward(self, x: Tensor, rotary: Rotary | None, marks: AttentionInputs) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, marks))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class HiddenDropout(nn.Module):
    """Dropout in the residual stream: the same on all tensor ranks, which hold copies of it, unless they
    split it."""

    def __init__(self, config: ModelConfig, layout: Layout = ONE_PROCESS_LAYOUT) -> None:
        super().__init__()
        self.p, self.split_over = (
            config.hidden_dropout,
            layout.tensor if layout.sequence_parallel else ONE_RANK,
        )

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training, self.split_over)


class Embedding(nn.Module):
    """Token embedding, plus learned positions where the shape has them."""

    def __init__(
        self, config: ModelConfig, padded_vocab_size: int, layout: Layout = ONE_PROCESS_LAYOUT
    ) -> None:
        super().__init__()
        self.layout = layout
        learned = config.position_embedding_type == "learned_absolute"
        # Positions are added to all that the tensor ranks share, which is split afterwards.
        self.splits = layout.sequence_parallel and learned
        lookup = replace(layout, sequence_parallel=False) if learned else layout
        self.tokens = VocabularyParallelEmbedding(padded_vocab_size, config.hidden_size, lookup)
        self.positions = nn.Embedding(config.max_positions, config.hidden_size) if learned else None
        self.dropout = HiddenDropout(config, layout)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """tokens: [b, s], int64 -> [b, s, h]. positions: [b, s], default those in the sequence."""
        x = self.tokens(tokens)
        if self.positions is not None:
            length = tokens.shape[1]
            first = self.layout.context.rank * length
            if positions is None:
                positions = torch.arange(first, first + length, device=tokens.device)
            x = x + self.positions(positions)
        if self.splits:
            x = scatter(x, self.layout.tensor, SEQUENCE)
        return self.dropout(x)


class GPT(nn.Module):
    """A decoder-only language model, or one rank's part of it.

    Args:
        config: the shape.
        vocab_size: tokens that there are; the tables have padding rows beyond, which never count.
        layout: the default holds the whole model.
        documents: what an end-of-document token resets.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        layout: Layout = ONE_PROCESS_LAYOUT,
        documents: DocumentMasking = NO_DOCUMENT_MASKING,
    ) -> None:
        super().__init__()
        self.vocab_size, self.layout, self.documents = vocab_size, layout, documents
        padded_vocab_size = config.padded_vocab_size(vocab_size, layout.tensor.size)
        self.embedding = Embedding(config, padded_vocab_size, layout)
        self.rotary = Rotary.of(config)
        self.blocks = nn.ModuleList(Block(config, layout) for _ in range(config.num_layers))
        self.final_norm = norm(config, layout)
        self.output = None
        if config.untie_embeddings_and_output_weights:
            self.output = ColumnParallelLinear(config.hidden_size, padded_vocab_size, False, layout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean next-token loss. tokens: [b, s + 1], int64, whole sequences on every rank; the last column is
        only a target. Along a context axis the mean is over the rank's part of the sequence. Tokens whose
        loss does not count are in the mean, as 0."""
        targets = part_of_sequence(self.documents.targets(tokens), self.layout.context)
        hidden = self.hidden(tokens[:, :-1])
        masked = self.documents.loss
        return next_token_loss(hidden, targets, self.output_weight, self.vocab_size, self.layout, masked)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Final hidden states of tokens [b, s]: [b, s / context ranks, h], with sequence parallelism
        [b, s / context ranks / tensor ranks, h]."""
        marks, here = NO_ATTENTION_INPUTS, None
        if self.documents.marks_tokens:
            marks = self.documents.marks(
                self.documents.document_ids(tokens), self.embedding.tokens.weight.dtype
            )
            here = marks.positions
        if here is not None:
            here = part_of_sequence(here, self.layout.context)
        x = self.embedding(part_of_sequence(tokens, self.layout.context), here)
        for block in self.blocks:
            x = block(x, self.rotary, marks)
        return self.final_norm(x)

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits [b, s, vocabulary] of tokens [b, s], on every rank."""
        x = gather(into_vocabulary(self.hidden(tokens), self.layout), self.layout.context, dim=SEQUENCE)
        return gather(x @ self.output_weight.t(), self.layout.tensor, dim=-1)[..., : self.vocab_size]

    @property
    def output_weight(self) -> Tensor:
        """[padded vocabulary / tensor ranks, h]."""
        return self.embedding.tokens.weight if self.output is None else self.output.weight


def next_token_loss(
    hidden: Tensor, targets: Tensor, weight: Tensor, vocab_size: int, layout: Layout, masked: bool = False
) -> Tensor:
    """Mean cross entropy of final hidden states; where a target is IGNORE_INDEX it is 0.

    Args:
        hidden: as `GPT.hidden` returns it.
        targets: [b, s], int64.
        masked: whether there may be targets that do not count.
        weight: the output matrix, [padded vocabulary / tensor ranks, h].
        vocab_size: before padding.
    """
    x = into_vocabulary(hidden, layout).flatten(0, 1)
    targets = targets.flatten()
    counted = targets != IGNORE_INDEX if masked else None
    if masked:
        targets = targets.clamp(min=0)
    return linear_cross_entropy(x, weight, targets, vocab_size, layout.tensor, counted)


def into_vocabulary(x: Tensor, layout: Layout) -> Tensor:
    """Into the output projection: [b, s, h], whose gradients from the ranks' parts of the vocabulary add
    up."""
    return gather_sequence(x, layout.tensor) if layout.sequence_parallel else copy(x, layout.tensor)


def norm(config: ModelConfig, layout: Layout = ONE_PROCESS_LAYOUT) -> nn.Module:
    is_rms, arguments = config.normalization == "RMSNorm", (config.hidden_size, config.norm_epsilon)
    if layout.sequence_parallel:
        return (SequenceParallelRMSNorm if is_rms else SequenceParallelLayerNorm)(*arguments, layout.tensor)
    return (nn.RMSNorm if is_rms else nn.LayerNorm)(*arguments)


def initialise(
    model: nn.Module,
    config: ModelConfig,
    seed: int,
    whole: Callable[[nn.Parameter], AbstractContextManager[object]] = nullcontext,
) -> None:
    """GPT-2's initial weights: normal(0, std), residual projections normal(0, std / sqrt(2 layers)), biases
    0, norms 1.

    Every parameter draws from a generator of its own, seeded by (seed, name): the weights depend neither on
    the mesh nor on which other parameters a process holds. For `model` and `whole` see `write_weights`.
    """
    residual_std = config.init_method_std / math.sqrt(2 * config.num_layers)

    def draw(name: str, shape: Sequence[int]) -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        is_residual = name.endswith(("attention.output.weight", "mlp.output.weight"))
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        std = residual_std if is_residual else config.init_method_std
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    write_weights(model, draw, whole)


WeightSource = Callable[[str, Sequence[int]], Tensor]
"""The whole parameter of a name and a shape, padding rows of the vocabulary left out."""


@torch.no_grad()
def write_weights(
    model: nn.Module,
    source: WeightSource,
    whole: Callable[[nn.Parameter], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Give every parameter its value; a rank takes its part of the whole. Padding rows are 0.

    Args:
        model: a GPT, or a stage's layers arranged as one, with its `vocab_size`.
        whole: context in which a parameter has its full shape and can be written; ZeRO-3 gathers it there.
    """
    for name, parameter in model.named_parameters():
        with whole(parameter):
            parameter.copy_(part_from(source, name, parameter, parameter.shape, model.vocab_size))


def part_from(
    source: WeightSource, name: str, parameter: nn.Parameter, shape: Sequence[int], vocab_size: int
) -> Tensor:
    """What this rank holds of a source's whole parameter, of this shape. Padding rows of the vocabulary are
    0."""
    shard = shard_of(parameter)
    whole = shard.whole_shape(shape) if shard else tuple(shape)
    if name in VOCABULARY_TABLES:
        values = torch.zeros(whole)
        values[:vocab_size] = source(name, (vocab_size, *whole[1:]))
    else:
        values = source(name, whole)
    return shard.of(values) if shard else values


def count_parameters(config: ModelConfig, vocab_size: int, layout: Layout = ONE_PROCESS_LAYOUT) -> int:
    """Parameters of a model, or of a rank's part of it, counted on torch's meta device: nothing is
    allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config, vocab_size, layout).parameters())


def flops_per_token(config: ModelConfig, parameters: int, padded_vocab_size: int) -> float:
    """Floating-point operations of training on one token, forward and backward, recomputation not counted.

    6 per weight in a matrix product, plus 12 layers x heads x head size x sequence for attention scores and
    values (PaLM, arXiv 2204.02311, appendix B). Look-up tables do no work, a tied output matrix does.
    """
    idle = (
        config.max_positions * config.hidden_size
        if config.position_embedding_type == "learned_absolute"
        else 0
    )
    if config.untie_embeddings_and_output_weights:
        idle += padded_vocab_size * config.hidden_size
    attention = 12 * config.num_layers * config.num_attention_heads * config.head_dim * config.seq_length
    return 6.0 * (parameters - idle) + attention
