"""The part of the model that the ranks of each pipeline stage hold, counted on torch's meta device."""

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
    """One rank's part of the model, before ZeRO shards it further. Sizes in elements."""

    sizes: tuple[int, ...]
    """Of each parameter."""
    buffers: int
    """Tables such as the rotary one, in all."""
    blocks: int
    has_embedding: bool
    has_output: bool

    @property
    def parameters(self) -> int:
        return sum(self.sizes)


def parts_of_stages(config: Config, vocab_size: int, shape: MeshShape) -> list[Part]:
    """One part a pipeline stage, in their order; all ranks of a stage hold parts of the same sizes.

    A tied embedding counts on both ends of the pipe, which hold a copy each. `vocab_size`: before padding.
    """
    # Of a rank of a mesh that need not exist: its axes have sizes and no groups.
    layout = Layout.of(config, MeshAxis(0, shape.tensor), MeshAxis(0, shape.context))
    with torch.device("meta"):
        if shape.pipe == 1:
            return [_part([GPT(config.model, vocab_size, layout)], config.model.num_layers, True, True)]
        layers = [layer.build() for layer in pipeline_layers(config.model, vocab_size, layout)]
    counts = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    bounds = stage_bounds(counts, shape.pipe, config.parallel.pipeline_partition)
    # Around the blocks: the embedding before, the last norm and the output behind.
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
