"""Write our weights as a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.huggingface.companion_files import GENERATION, copy_companion_files
from megatron_adalrs.huggingface.config_json import CONFIG, config_json, family_of
from megatron_adalrs.huggingface.reader import parameter_shapes, part_shapes
from megatron_adalrs.huggingface.tensor_files import Entry, write_tensors
from megatron_adalrs.huggingface.tensor_names import Family
from megatron_adalrs.model.initialization import WeightSource
from megatron_adalrs.utils.atomic_files import new_folder

MAX_SHARD_SIZE = 5 * 10**9  # bytes, the default of transformers


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
    """Write a model folder that transformers loads, with one tensor in memory at a time.

    The folder is renamed once it is complete.

    Args:
        folder: Must not exist, or be empty.
        weights: Parameters by their names in `GPT`.
        dtype: Dtype of each parameter; the one with most bytes is written to config.json.
        token_ids: bos_token_id, eos_token_id and pad_token_id.
        companions: Files to copy into the folder, or contents to write, by name.

    Raises:
        ValueError: The model fits no family, or the folder is not empty.
        OSError: A file cannot be written.
    """
    family = family_of(model)
    tensors = ConvertedTensors(family, model, vocab_size, weights)
    entries = [Entry(name, dtype(parameter), shape) for name, (parameter, shape) in tensors.shapes.items()]
    sizes: dict[torch.dtype, int] = {}
    for entry in entries:
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    main = str(max(sizes, key=lambda one: sizes[one])).removeprefix("torch.")
    with new_folder(folder) as draft:
        _write_json(draft / CONFIG, config_json(family, model, vocab_size, main, token_ids))
        write_tensors(draft, entries, tensors, max_shard_size)
        copy_companion_files(companions, draft)
        if not (draft / GENERATION).exists():
            known = {name: value for name, value in token_ids.items() if value is not None}
            _write_json(draft / GENERATION, {"_from_model_config": True} | known)


class ConvertedTensors:
    """Our weights with the names and layouts of a family's tensors.

    Args:
        weights: Parameters by their names in `GPT`.
    """

    def __init__(self, family: Family, model: ModelConfig, vocab_size: int, weights: WeightSource) -> None:
        self._weights, self._ours = weights, parameter_shapes(model, vocab_size)
        self._places: dict[str, tuple[str, int, int, bool]] = {}
        self.shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        """Our parameter that each tensor is part of, and the shape of the tensor."""
        for parameter, shape in self._ours.items():
            names, transposed = family.tensors_of(parameter)
            first = 0
            for name, part in zip(names, part_shapes(model, parameter, shape, len(names)), strict=True):
                self._places[name] = parameter, first, first + part[0], transposed
                self.shapes[name] = parameter, part[::-1] if transposed else part
                first += part[0]
        self._last: tuple[str, Tensor] | None = None  # q, k and v are requested one after the other

    def __call__(self, name: str) -> Tensor:
        parameter, first, last, transposed = self._places[name]
        if self._last is None or self._last[0] != parameter:
            self._last = None  # free it before the next is read
            self._last = parameter, self._weights(parameter, self._ours[parameter])
        part = self._last[1][first:last]
        return part.t() if transposed else part

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Return an iterator over names and tensors."""
        return ((name, self(name)) for name in self.shapes)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
