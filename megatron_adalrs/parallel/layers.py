"""Linear layers, embedding and norms that are split along the tensor axis.

Along an axis of one process each performs the operations of the torch layer that it extends. With
`sequence_parallel` the activations between a row-parallel layer and the next column-parallel one are split
along the sequence, [b, s / axis, h]; otherwise every rank holds all of them, [b, s, h].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_adalrs.distributed.process_mesh import MeshAxis
from megatron_adalrs.parallel.layout import ONE_PROCESS_LAYOUT, Layout
from megatron_adalrs.parallel.mappings import copy, gather_sequence, reduce, reduce_scatter_sequence


@dataclass(frozen=True)
class Shard:
    """The part of a whole parameter that a rank holds.

    Along `dim` the whole parameter consists of blocks of these sizes ([q | k | v], [gate | up], or a single
    one). Each block is split into `count` equal parts; the rank holds part `index` of every block, in order.
    """

    dim: int
    blocks: tuple[int, ...]
    index: int
    count: int

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the whole parameter, given that of a part."""
        return (*shape[: self.dim], sum(self.blocks), *shape[self.dim + 1 :])

    def of(self, whole: Tensor) -> Tensor:
        """Return this rank's part of the whole parameter."""
        blocks = torch.split(whole, list(self.blocks), self.dim)
        return torch.cat([block.chunk(self.count, self.dim)[self.index] for block in blocks], self.dim)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the whole parameter from the parts of all ranks, in rank order: the inverse of `of`."""
        sizes = [block // self.count for block in self.blocks]
        by_rank = [torch.split(part, sizes, self.dim) for part in parts]
        return torch.cat([piece for block in zip(*by_rank, strict=True) for piece in block], self.dim)


def mark_shard(parameter: Tensor | None, axis: MeshAxis, dim: int, blocks: Sequence[int]) -> None:
    """Set attributes of a parameter that is part of a whole, which `shard_of` and DeepSpeed read."""
    if parameter is not None and axis.size > 1:
        shard = Shard(dim, tuple(blocks), axis.rank, axis.size)
        # DeepSpeed adds a parameter without `tensor_model_parallel` to the gradient norm on one tensor rank.
        parameter.shard = shard  # type: ignore[attr-defined]  # an attribute of ours
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # an attribute of Megatron-LM's


def shard_of(parameter: nn.Parameter) -> Shard | None:
    """Return which part of a whole parameter this is; None if it is the whole."""
    return getattr(parameter, "shard", None)


class ColumnParallelLinear(nn.Linear):
    """A linear layer [..., in] -> [..., out / axis]: each rank computes its part of the output features.

    Args:
        in_features: input features.
        out_features: output features of the whole layer, or the sizes of its blocks, such as (q, k, v); each
            rank computes its part of every block. All sizes are divisible by the size of the axis.
        bias: whether the layer has a bias.
        layout: the tensor axis, and whether the input is split along the sequence.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        bias: bool,
        layout: Layout = ONE_PROCESS_LAYOUT,
    ) -> None:
        blocks = (out_features,) if isinstance(out_features, int) else tuple(out_features)
        axis = layout.tensor
        super().__init__(in_features, _divide(sum(blocks), axis), bias=bias)
        self.axis = axis
        self.sequence_parallel = layout.sequence_parallel
        for parameter in (self.weight, self.bias):
            mark_shard(parameter, axis, 0, blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to this rank's features [..., out / axis]."""
        x = gather_sequence(x, self.axis) if self.sequence_parallel else copy(x, self.axis)
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Linear):
    """A linear layer [..., in / axis] -> [..., out]: the ranks' products of their input features are summed.

    Args:
        in_features: input features of the whole layer, divisible by the size of the axis.
        out_features: output features.
        bias: whether the layer has a bias.
        layout: the tensor axis, and whether the output is split along the sequence.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, layout: Layout = ONE_PROCESS_LAYOUT
    ) -> None:
        axis = layout.tensor
        super().__init__(_divide(in_features, axis), out_features, bias=bias)
        self.axis = axis
        self.sequence_parallel = layout.sequence_parallel
        mark_shard(self.weight, axis, 1, (in_features,))

    def forward(self, x: Tensor) -> Tensor:
        """Map this rank's features x [..., in / axis] to [..., out]."""
        if self.axis.size == 1:
            return F.linear(x, self.weight, self.bias)
        partial = F.linear(x, self.weight)
        if not self.sequence_parallel:
            y = reduce(partial, self.axis)
            return y if self.bias is None else y + self.bias
        y = reduce_scatter_sequence(partial, self.axis)
        return y if self.bias is None else y + copy(self.bias, self.axis)


class VocabularyParallelEmbedding(nn.Embedding):
    """An embedding [b, s] -> [b, s, h]: each rank looks up the tokens in its range of the vocabulary.

    Args:
        padded_vocab_size: rows of the whole table, divisible by the size of the axis.
        hidden_size: columns of the table.
        layout: the tensor axis, and whether the output is split along the sequence.
    """

    def __init__(self, padded_vocab_size: int, hidden_size: int, layout: Layout = ONE_PROCESS_LAYOUT) -> None:
        axis = layout.tensor
        super().__init__(_divide(padded_vocab_size, axis), hidden_size)
        self.axis = axis
        self.sequence_parallel = layout.sequence_parallel
        mark_shard(self.weight, axis, 0, (padded_vocab_size,))

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens [b, s], int64."""
        if self.axis.size == 1:
            return F.embedding(tokens, self.weight)
        rows = tokens - self.axis.rank * self.num_embeddings
        elsewhere = (rows < 0) | (rows >= self.num_embeddings)
        partial = F.embedding(rows.masked_fill(elsewhere, 0), self.weight).masked_fill(
            elsewhere.unsqueeze(-1), 0.0
        )
        return (reduce_scatter_sequence if self.sequence_parallel else reduce)(partial, self.axis)


class SequenceParallelLayerNorm(nn.LayerNorm):
    """LayerNorm on a part of the sequence. `copy` sums the gradients of its parameters over the ranks."""

    def __init__(self, hidden_size: int, eps: float, axis: MeshAxis) -> None:
        super().__init__(hidden_size, eps=eps)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Normalise this rank's part of the sequence, [b, s / axis, h]."""
        weight = copy(self.weight, self.axis)
        bias = copy(self.bias, self.axis)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class SequenceParallelRMSNorm(nn.RMSNorm):
    """RMSNorm on a part of the sequence. `copy` sums the gradients of its weight over the ranks."""

    def __init__(self, hidden_size: int, eps: float, axis: MeshAxis) -> None:
        super().__init__(hidden_size, eps=eps)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Normalise this rank's part of the sequence, [b, s / axis, h]."""
        return F.rms_norm(x, self.normalized_shape, copy(self.weight, self.axis), self.eps)


def _divide(size: int, axis: MeshAxis) -> int:
    assert size % axis.size == 0, f"{size} features are not divisible by {axis.size} ranks"
    return size // axis.size
