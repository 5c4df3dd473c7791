"""Read our weights from a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.config.base import describe_validation_error
from megatron_adalrs.huggingface.config_json import CONFIG, Shape
from megatron_adalrs.huggingface.tensor_files import TensorFiles
from megatron_adalrs.model.gpt import GPT

_CHUNK = 4096  # rows compared at a time


class HuggingFaceModel:
    """The weights in a model folder by their names in `GPT`: a `WeightSource` that reads on demand.

    Raises:
        ValueError: A file is missing or damaged, the configuration is not supported, or a tensor is missing,
            unknown or of the wrong shape; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        self.shape = Shape(folder)
        self.family, self.vocab_size = self.shape.family, self.shape.vocab_size
        try:
            self.model = ModelConfig(**self.shape.fields, seq_length=self.shape.max_positions)
        except ValidationError as error:
            raise ValueError(f"{folder / CONFIG}: {describe_validation_error(error)}") from None
        self._folder, self._files = folder, TensorFiles(folder)
        # Files of a model without its head, such as the published ones of GPT-2, have names without prefix.
        prefix = self.family.prefix
        self._prefix = prefix if any(name.startswith(prefix) for name in self._files.names) else ""
        self._shapes = parameter_shapes(self.model, self.vocab_size)
        self._check()

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return a whole parameter in the precision of the file."""
        names, transposed = self._tensors_of(name)
        parts = [self._files(one) for one in names]
        parts = [part.t() for part in parts] if transposed else parts
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        assert whole.shape == torch.Size(shape), f"{name} is {tuple(whole.shape)}, not {tuple(shape)}"
        return whole

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a parameter."""
        return reduce(
            torch.promote_types, [self._files.entry(one).dtype for one in self._tensors_of(name)[0]]
        )

    def _tensors_of(self, parameter: str) -> tuple[list[str], bool]:
        names, transposed = self.family.tensors_of(parameter)
        prefix = self.family.prefix
        return [
            self._prefix + one.removeprefix(prefix) if one.startswith(prefix) else one for one in names
        ], transposed

    def _check(self) -> None:
        known: set[str] = set()
        for parameter, shape in self._shapes.items():
            names, transposed = self._tensors_of(parameter)
            known |= set(names)
            for name, expected in zip(
                names, part_shapes(self.model, parameter, shape, len(names)), strict=True
            ):
                if name not in self._files:
                    raise ValueError(f"{self._folder} has no tensor {name}")
                try:
                    found = self._files.entry(name).shape
                except ValueError as error:
                    raise ValueError(f"{self._folder}: {error}") from None
                if found != (expected[::-1] if transposed else expected):
                    raise ValueError(
                        f"{self._folder}: {name} has shape {list(found)}, {CONFIG} says "
                        f"{list(expected[::-1] if transposed else expected)}"
                    )
        if self.shape.tied and "lm_head.weight" in self._files:
            self._check_tied()
            known.add("lm_head.weight")
        others = sorted(name for name in self._files.names - known if not self.family.buffers.fullmatch(name))
        if others:
            listed = f"{', '.join(others[:3])}{' ...' if len(others) > 3 else ''}"
            raise ValueError(
                f"{self._folder} has tensors that no {self.family.architecture} of its shape has: {listed}"
            )

    def _check_tied(self) -> None:
        """Check that a stored output matrix of a tied model is the token embedding."""
        head = self._files("lm_head.weight")
        table = self._files(self._tensors_of("embedding.tokens.weight")[0][0])
        same = head.shape == table.shape and all(
            torch.equal(head[first : first + _CHUNK], table[first : first + _CHUNK])
            for first in range(0, len(table), _CHUNK)
        )
        if not same:
            raise ValueError(
                f"{self._folder / CONFIG}: tie_word_embeddings: True: lm_head.weight is not the token "
                "embedding"
            )


def parameter_shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of our parameters, without padding rows of the vocabulary."""
    unpadded = model.model_copy(update={"make_vocab_size_divisible_by": 1})
    with torch.device("meta"):
        return {name: tuple(one.shape) for name, one in GPT(unpadded, vocab_size).named_parameters()}


def part_shapes(
    model: ModelConfig, parameter: str, shape: tuple[int, ...], count: int
) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of the `count` tensors that are concatenated in one of our parameters."""
    if count == 1:
        sizes = [shape[0]]
    elif "attention.qkv" in parameter:
        kv = model.num_key_value_heads * model.head_dim
        sizes = [model.num_attention_heads * model.head_dim, kv, kv]
    else:
        sizes = [model.mlp_size] * count
    yield from ((size, *shape[1:]) for size in sizes)
