"""Linear layers, embedding and norms whose work is shared out along the tensor axis.

Along an axis of one process each is the torch layer that it extends, to the operation. With
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
    """Which part of a whole parameter a rank holds.

    Along `dim` the whole parameter consists of blocks of these sizes ([q | k | v], [gate | up], or a single
    one); each is cut into `count` equal parts, and the rank holds part `index` of every block, one after the
    other.
    """

    dim: int
    blocks: tuple[int, ...]
    index: int
    count: int

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole parameter, given that of a part."""
        return (*shape[: self.dim], sum(self.blocks), *shape[self.dim + 1 :])

    def of(self, whole: Tensor) -> Tensor:
        """This rank's part of the whole parameter."""
        parts = [
            block.chunk(self.count, self.dim)[self.index] for block in whole.split(self.blocks, self.dim)
        ]
        return torch.cat(parts, self.dim)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole parameter, from every rank's part in their order: what `of` takes apart."""
        sizes = [block // self.count for block in self.blocks]
        cut = [part.split(sizes, self.dim) for part in parts]
        return torch.cat([piece for block in zip(*cut, strict=True) for piece in block], self.dim)


def mark_shard(parameter: nn.Parameter | None, axis: MeshAxis, dim: int, blocks: Sequence[int]) -> None:
    """Note on a parameter which part of the whole it is: `shard_of` reads it, and DeepSpeed
    `tensor_model_parallel`."""
    if parameter is not None and axis.size > 1:
        parameter.shard = Shard(dim, tuple(blocks), axis.rank, axis.size)  # type: ignore[attr-defined]
        # DeepSpeed counts a parameter without this mark once in the gradient norm, not once on each tensor
        # rank.
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def shard_of(parameter: nn.Parameter) -> Shard | None:
    """Which part of a whole parameter this is; None if it is the whole."""
    return getattr(parameter, "shard", None)


class ColumnParallelLinear(nn.Linear):
    """[.., in] -> [.., out / axis]: each rank computes its part of the output features.

    Args:
        out_features: of the whole layer, or the sizes of the blocks that it makes, such as (q, k, v). Each
            rank makes its part of every block. The axis divides each size.
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
        super().__init__(in_features, _divided(sum(blocks), axis), bias=bias)
        self.axis, self.sequence_parallel = axis, layout.sequence_parallel
        for parameter in (self.weight, self.bias):
            mark_shard(parameter, axis, 0, blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = gather_sequence(x, self.axis) if self.sequence_parallel else copy(x, self.axis)
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Linear):
    """[.., in / axis] -> [.., out]: each rank multiplies its part of the input features, the results are
    added up.

    Args:
        in_features: of the whole layer; the axis divides it.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, layout: Layout = ONE_PROCESS_LAYOUT
    ) -> None:
        axis = layout.tensor
        super().__init__(_divided(in_features, axis), out_features, bias=bias)
        self.axis, self.sequence_parallel = axis, layout.sequence_parallel
        mark_shard(self.weight, axis, 1, (in_features,))

    def forward(self, x: Tensor) -> Tensor:
        if self.axis.size == 1:
            return F.linear(x, self.weight, self.bias)
        partial = F.linear(x, self.weight)
        if not self.sequence_parallel:
            y = reduce(partial, self.axis)
            return y if self.bias is None else y + self.bias
        y = reduce_scatter_sequence(partial, self.axis)
        return y if self.bias is None else y + copy(self.bias, self.axis)


class VocabularyParallelEmbedding(nn.Embedding):
    """[b, s] -> [b, s, h]: each rank holds a range of the vocabulary and looks up the tokens in it.

    Args:
        padded_vocab_size: rows of the whole table; the axis divides it.
    """

    def __init__(self, padded_vocab_size: int, hidden_size: int, layout: Layout = ONE_PROCESS_LAYOUT) -> None:
        axis = layout.tensor
        super().__init__(_divided(padded_vocab_size, axis), hidden_size)
        self.axis, self.sequence_parallel = axis, layout.sequence_parallel
        mark_shard(self.weight, axis, 0, (padded_vocab_size,))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.axis.size == 1:
            return F.embedding(tokens, self.weight)
        rows = tokens - self.axis.rank * self.num_embeddings
        elsewhere = (rows < 0) | (rows >= self.num_embeddings)
        partial = F.embedding(rows.masked_fill(elsewhere, 0), self.weight).masked_fill(
            elsewhere.unsqueeze(-1), 0.0
        )
        return (reduce_scatter_sequence if self.sequence_parallel else reduce)(partial, self.axis)


class SequenceParallelLayerNorm(nn.LayerNorm):
    """LayerNorm on a part of the sequence: `copy` adds up the gradients that the ranks' parts give its
    parameters."""

    def __init__(self, hidden_size: int, eps: float, axis: MeshAxis) -> None:
        super().__init__(hidden_size, eps=eps)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = copy(self.weight, self.axis), copy(self.bias, self.axis)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class SequenceParallelRMSNorm(nn.RMSNorm):
    """RMSNorm on a part of the sequence: `copy` adds up the gradients that the ranks' parts give its
    weight."""

    def __init__(self, hidden_size: int, eps: float, axis: MeshAxis) -> None:
        super().__init__(hidden_size, eps=eps)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, copy(self.weight, self.axis), self.eps)


def _divided(size: int, axis: MeshAxis) -> int:
    assert size % axis.size == 0, f"{size} features on {axis.size} ranks: the configuration refuses that"
    return size // axis.size
