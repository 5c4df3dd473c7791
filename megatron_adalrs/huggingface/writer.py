"""Our weights as a folder of Hugging Face's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.huggingface.companion_files import GENERATION, copy_companions
from megatron_adalrs.huggingface.config_json import CONFIG, config_json, family_of
from megatron_adalrs.huggingface.families import Family
from megatron_adalrs.huggingface.reader import parameter_shapes, part_shapes
from megatron_adalrs.huggingface.tensor_files import Entry, write_tensors
from megatron_adalrs.model.initialization import WeightSource
from megatron_adalrs.utils.atomic_files import new_folder

MAX_SHARD_SIZE = 5 * 10**9  # bytes, as transformers has it


def write_model(
    folder: Path,
    model: ModelConfig,
    vocab_size: int,
    weights: WeightSource,
    dtype: Callable[[str], torch.dtype],
    token_ids: Mapping[str, Any],
    companions: Mapping[str, Path | bytes],
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write a model folder that transformers loads. It appears whole or not at all; one tensor is in memory
    at a time.

    Args:
        folder: must not exist, or be empty.
        weights: by GPT's names.
        dtype: of each parameter, by GPT's names; the most frequent one goes into config.json.
        token_ids: bos_token_id, eos_token_id, pad_token_id.
        companions: files to copy beside the weights, or contents to write there, by the names that they get.

    Raises:
        ValueError: no family has this shape, or there is something in the folder.
        OSError: it cannot be written.
    """
    family = family_of(model)
    tensors = TheirTensors(family, model, vocab_size, weights)
    entries = [Entry(name, dtype(parameter), shape) for name, (parameter, shape) in tensors.shapes.items()]
    sizes: dict[torch.dtype, int] = {}
    for entry in entries:
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    main = str(max(sizes, key=lambda one: sizes[one])).removeprefix("torch.")
    with new_folder(folder) as draft:
        _write_json(draft / CONFIG, config_json(family, model, vocab_size, main, token_ids))
        write_tensors(draft, entries, tensors, max_shard_size)
        copy_companions(companions, draft)
        if not (draft / GENERATION).exists():
            known = {name: value for name, value in token_ids.items() if value is not None}
            _write_json(draft / GENERATION, {"_from_model_config": True} | known)


class TheirTensors:
    """Our weights as tensors of their names and layouts.

    Args:
        weights: by GPT's names.
    """

    def __init__(self, family: Family, model: ModelConfig, vocab_size: int, weights: WeightSource) -> None:
        self._weights, self._ours = weights, parameter_shapes(model, vocab_size)
        self._places: dict[str, tuple[str, int, int, bool]] = {}
        self.shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        """Of every tensor, by its name: the parameter of ours that it is in, and its shape."""
        for parameter, shape in self._ours.items():
            names, transposed = family.tensors_of(parameter)
            first = 0
            for name, part in zip(names, part_shapes(model, parameter, shape, len(names)), strict=True):
                self._places[name] = parameter, first, first + part[0], transposed
                self.shapes[name] = parameter, part[::-1] if transposed else part
                first += part[0]
        self._last: tuple[str, Tensor] | None = None  # q, k and v are asked for one after the other

    def __call__(self, name: str) -> Tensor:
        parameter, first, last, transposed = self._places[name]
        if self._last is None or self._last[0] != parameter:
            self._last = None  # two are not held at a time
            self._last = parameter, self._weights(parameter, self._ours[parameter])
        part = self._last[1][first:last]
        return part.t() if transposed else part

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name."""
        return ((name, self(name)) for name in self.shapes)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
