"""Initial weights: random as in GPT-2, or read from a source such as a checkpoint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.parallel.layers import shard_of

VOCABULARY_TABLES = ("embedding.tokens.weight", "output.weight")
"""Parameters whose rows are padded to a multiple of the tensor ranks."""
WeightSource = Callable[[str, Sequence[int]], Tensor]
"""Returns the whole parameter of a name and a shape, without the padding rows of the vocabulary."""
FullShape = Callable[[nn.Parameter], AbstractContextManager[object]]
"""Returns a context in which a parameter has its full shape and can be written; ZeRO-3 gathers it."""


class LanguageModel(Protocol):
    """A GPT, or the layers of a pipeline stage under GPT's names."""

    vocab_size: int
    """Size of the vocabulary before padding."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's parameters by GPT's names."""


def init_weights(
    model: LanguageModel, config: ModelConfig, seed: int, whole: FullShape = nullcontext
) -> None:
    """Draw initial weights as GPT-2 does.

    Matrices are normal(0, std), residual projections normal(0, std / sqrt(2 layers)), biases 0 and norm
    weights 1. Every parameter has a generator of its own, seeded by (seed, name), so that the weights depend
    neither on the mesh nor on which other parameters a process holds.

    Args:
        model: receives the weights.
        config: the shape of the model, and the standard deviation.
        seed: the seed of the run.
        whole: see `FullShape`.
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


@torch.no_grad()
def write_weights(model: LanguageModel, source: WeightSource, whole: FullShape = nullcontext) -> None:
    """Set every parameter from a source of whole parameters; a rank takes its part. Padding rows are 0.

    Args:
        model: receives the weights.
        source: returns whole parameters.
        whole: see `FullShape`.
    """
    for name, parameter in model.named_parameters():
        with whole(parameter):
            parameter.copy_(local_part(source, name, parameter, parameter.shape, model.vocab_size))


def local_part(
    source: WeightSource, name: str, parameter: nn.Parameter, shape: Sequence[int], vocab_size: int
) -> Tensor:
    """Return this rank's part of a source's whole parameter. Padding rows of the vocabulary are 0.

    Args:
        source: returns whole parameters.
        name: GPT's name of the parameter.
        parameter: this rank's parameter, which may be marked as a shard.
        shape: shape of this rank's part, which ZeRO-3 keeps apart from the parameter.
        vocab_size: size of the vocabulary before padding.
    """
    shard = shard_of(parameter)
    whole = shard.whole_shape(shape) if shard else tuple(shape)
    if name in VOCABULARY_TABLES:
        values = torch.zeros(whole)
        values[:vocab_size] = source(name, (vocab_size, *whole[1:]))
    else:
        values = source(name, whole)
    return shard.of(values) if shard else values
