"""The GPT model: GPT-2, Llama and Qwen2 from one set of modules.

Shapes: b = micro batch, s = sequence, h = hidden size. Along a tensor axis each rank has an equal part of the
heads, the MLP's width and the vocabulary; with sequence parallelism the residual stream is [b, s / axis, h].
Along a context axis s is the rank's part of the sequence.

The model reads tokens only. An encoder for other inputs, such as images, would be a module in this package
whose output replaces positions in the output of `Embedding`, and of `PipelineEmbedding` in `pipeline.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
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
from megatron_adalrs.model.mlp import MLP
from megatron_adalrs.model.rotary_embedding import Rotary
from megatron_adalrs.parallel.activation_checkpointing import checkpoint_activations
from megatron_adalrs.parallel.context_parallel import split_sequence
from megatron_adalrs.parallel.cross_entropy import linear_cross_entropy
from megatron_adalrs.parallel.layers import (
    ColumnParallelLinear,
    SequenceParallelLayerNorm,
    SequenceParallelRMSNorm,
    VocabularyParallelEmbedding,
)
from megatron_adalrs.parallel.layout import ONE_PROCESS_LAYOUT, Layout
from megatron_adalrs.parallel.mappings import SEQUENCE, copy, gather, gather_sequence, scatter
from megatron_adalrs.parallel.random import dropout


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, layout: Layout = ONE_PROCESS_LAYOUT) -> None:
        super().__init__()
        self.recompute = layout.recompute == "full"
        self.attention_norm = build_norm(config, layout)
        self.attention = Attention(config, layout)
        self.mlp_norm = build_norm(config, layout)
        self.mlp = MLP(config, layout)
        self.dropout = HiddenDropout(config, layout)

    def forward(
        self, x: Tensor, rotary: Rotary | None, attention_inputs: AttentionInputs = NO_ATTENTION_INPUTS
    ) -> Tensor:
        """Map x [b, s, h] to the same shape."""
        if self.recompute:
            return checkpoint_activations(self._forward, x, rotary, attention_inputs)
        return self._forward(x, rotary, attention_inputs)

    def _forward(self, x: Tensor, rotary: Rotary | None, attention_inputs: AttentionInputs) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, attention_inputs))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class HiddenDropout(nn.Module):
    """Dropout in the residual stream.

    Tensor ranks drop the same elements, since they hold copies of the stream, unless they split it.
    """

    def __init__(self, config: ModelConfig, layout: Layout = ONE_PROCESS_LAYOUT) -> None:
        super().__init__()
        self.p = config.hidden_dropout
        self.split_over = layout.tensor if layout.sequence_parallel else ONE_RANK

    def forward(self, x: Tensor) -> Tensor:
        """Apply dropout to x [b, s, h], or to the rank's part of it."""
        return dropout(x, self.p, self.training, self.split_over)


class Embedding(nn.Module):
    """Token embedding, plus learned positional embedding if the model has one."""

    def __init__(
        self, config: ModelConfig, padded_vocab_size: int, layout: Layout = ONE_PROCESS_LAYOUT
    ) -> None:
        super().__init__()
        self.layout = layout
        learned = config.position_embedding_type == "learned_absolute"
        # Positions are added to the whole sequence, which is split over the tensor ranks afterwards.
        self.splits = layout.sequence_parallel and learned
        lookup = replace(layout, sequence_parallel=False) if learned else layout
        self.tokens = VocabularyParallelEmbedding(padded_vocab_size, config.hidden_size, lookup)
        self.positions = nn.Embedding(config.max_positions, config.hidden_size) if learned else None
        self.dropout = HiddenDropout(config, layout)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Embed tokens.

        Args:
            tokens: [b, s], int64.
            positions: [b, s], int64; None counts from the start of the sequence.

        Returns:
            [b, s, h], or the tensor rank's part of it with sequence parallelism.
        """
        x = self.tokens(tokens)
        if self.positions is not None:
            length = tokens.shape[1]
            first = self.layout.context.rank * length
            if positions is None:
                positions = torch.arange(first, first + length, device=tokens.device)
            x = x + self.positions(positions)
        if self.splits:
            x = scatter(x, self.layout.tensor, SEQUENCE)
        y: Tensor = self.dropout(x)
        return y


class GPT(nn.Module):
    """A decoder-only language model, or one rank's part of it.

    Args:
        config: the shape of the model.
        vocab_size: size of the vocabulary before padding; padding rows never affect the loss.
        layout: the axes over which the model is split; the default is a whole model in one process.
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
        self.vocab_size = vocab_size
        self.layout = layout
        self.documents = documents
        padded_vocab_size = config.padded_vocab_size(vocab_size, layout.tensor.size)
        self.embedding = Embedding(config, padded_vocab_size, layout)
        self.rotary = Rotary.of(config)
        self.blocks = nn.ModuleList(Block(config, layout) for _ in range(config.num_layers))
        self.final_norm = build_norm(config, layout)
        self.output: ColumnParallelLinear | None = None
        if config.untie_embeddings_and_output_weights:
            self.output = ColumnParallelLinear(config.hidden_size, padded_vocab_size, False, layout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean next-token loss.

        Args:
            tokens: [b, s + 1], int64, whole sequences on every rank; the last column is only a target.

        Returns:
            A scalar. Along a context axis the mean is over the rank's part of the sequence. Tokens whose loss
            does not count enter the mean as 0.
        """
        targets = split_sequence(self.documents.targets(tokens), self.layout.context)
        hidden = self.hidden(tokens[:, :-1])
        masked = self.documents.loss
        return next_token_loss(hidden, targets, self.output_weight, self.vocab_size, self.layout, masked)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the final hidden states.

        Args:
            tokens: [b, s], int64, whole sequences.

        Returns:
            [b, s / context ranks, h], with sequence parallelism [b, s / context ranks / tensor ranks, h].
        """
        attention_inputs = NO_ATTENTION_INPUTS
        if self.documents.needs_document_ids:
            dtype = self.embedding.tokens.weight.dtype
            attention_inputs = self.documents.attention_inputs(self.documents.document_ids(tokens), dtype)
        positions = attention_inputs.positions
        if positions is not None:
            positions = split_sequence(positions, self.layout.context)
        x = self.embedding(split_sequence(tokens, self.layout.context), positions)
        for block in self.blocks:
            x = block(x, self.rotary, attention_inputs)
        y: Tensor = self.final_norm(x)
        return y

    def logits(self, tokens: Tensor) -> Tensor:
        """Return next-token logits [b, s, vocabulary] of tokens [b, s], the same on every rank."""
        x = output_projection_input(self.hidden(tokens), self.layout)
        x = gather(x, self.layout.context, dim=SEQUENCE)
        return gather(x @ self.output_weight.t(), self.layout.tensor, dim=-1)[..., : self.vocab_size]

    @property
    def output_weight(self) -> Tensor:
        """The output matrix, [padded vocabulary / tensor ranks, h]; the token embedding if tied."""
        return self.embedding.tokens.weight if self.output is None else self.output.weight


def next_token_loss(
    hidden: Tensor, targets: Tensor, weight: Tensor, vocab_size: int, layout: Layout, masked: bool = False
) -> Tensor:
    """Return the mean cross entropy of final hidden states; it is 0 where a target is IGNORE_INDEX.

    Args:
        hidden: the result of `GPT.hidden`.
        targets: [b, s], int64.
        weight: the output matrix, [padded vocabulary / tensor ranks, h].
        vocab_size: size of the vocabulary before padding.
        layout: the axes over which the model is split.
        masked: whether targets may be IGNORE_INDEX.
    """
    x = output_projection_input(hidden, layout).flatten(0, 1)
    targets = targets.flatten()
    counted = targets != IGNORE_INDEX if masked else None
    if masked:
        targets = targets.clamp(min=0)
    return linear_cross_entropy(x, weight, targets, vocab_size, layout.tensor, counted)


def output_projection_input(x: Tensor, layout: Layout) -> Tensor:
    """Prepare hidden states for the output projection, whose ranks hold parts of the vocabulary.

    Returns:
        [b, s, h]. Its gradients from all tensor ranks are summed.
    """
    return gather_sequence(x, layout.tensor) if layout.sequence_parallel else copy(x, layout.tensor)


def build_norm(config: ModelConfig, layout: Layout = ONE_PROCESS_LAYOUT) -> nn.Module:
    """Build the configured normalisation layer, LayerNorm or RMSNorm."""
    is_rms = config.normalization == "RMSNorm"
    arguments = (config.hidden_size, config.norm_epsilon)
    if layout.sequence_parallel:
        return (SequenceParallelRMSNorm if is_rms else SequenceParallelLayerNorm)(*arguments, layout.tensor)
    return (nn.RMSNorm if is_rms else nn.LayerNorm)(*arguments)


def count_parameters(config: ModelConfig, vocab_size: int, layout: Layout = ONE_PROCESS_LAYOUT) -> int:
    """Count the parameters of a model, or of a rank's part of it, without allocating them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPT(config, vocab_size, layout).parameters())
