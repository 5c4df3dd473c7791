"""Parameters of the ranks of each pipeline stage, counted on torch's meta device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from megatron_adalrs.config import Config
from megatron_adalrs.distributed.process_mesh import MeshAxis, MeshShape
from megatron_adalrs.engine import stage_bounds
from megatron_adalrs.model.gpt import GPT
from megatron_adalrs.model.pipeline import pipeline_layers
from megatron_adalrs.parallel.layout import Layout


@dataclass(frozen=True)
class Part:
    """Part of the model on one rank, before ZeRO shards it further. Sizes are in elements."""

    sizes: tuple[int, ...]
    """Size of each parameter."""
    buffers: int
    """Total size of buffers, such as the rotary tables."""
    blocks: int
    has_embedding: bool
    has_output: bool

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(self.sizes)


def parts_of_stages(config: Config, vocab_size: int, shape: MeshShape) -> list[Part]:
    """Return the part of each pipeline stage, in order; all ranks of a stage have parts of the same size.

    A tied embedding counts on the first and on the last stage, which have a copy each.

    Args:
        vocab_size: Size of the vocabulary without padding.
    """
    # The mesh need not exist: its axes have sizes and no process groups.
    layout = Layout.of(config, MeshAxis(0, shape.tensor), MeshAxis(0, shape.context))
    with torch.device("meta"):
        if shape.pipe == 1:
            return [_part([GPT(config.model, vocab_size, layout)], config.model.num_layers, True, True)]
        layers = [layer.build() for layer in pipeline_layers(config.model, vocab_size, layout)]
    counts = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    bounds = stage_bounds(counts, shape.pipe, config.parallel.pipeline_partition)
    # The embedding comes before the blocks, the final norm and the output after them.
    is_block = [False, *[True] * config.model.num_layers, False, False]
    return [
        _part(layers[start:stop], sum(is_block[start:stop]), start == 0, stop == len(layers))
        for start, stop in pairwise(bounds)
    ]


def _part(modules: Iterable[nn.Module], blocks: int, has_embedding: bool, has_output: bool) -> Part:
    together = nn.ModuleList(modules)
    sizes = tuple(parameter.numel() for parameter in together.parameters())
    return Part(
        sizes, sum(buffer.numel() for buffer in together.buffers()), blocks, has_embedding, has_output
    )
