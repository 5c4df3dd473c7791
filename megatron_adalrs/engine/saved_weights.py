"""Weights alone, from what an engine saved, whatever the grid and the ZeRO stage that it had.

What DeepSpeed 0.19.8 writes: without a pipe mp_rank_MM_model_states.pt, one file a tensor rank, with the module's
weights in its precision; under ZeRO-3 these are empty, and the fp32 masters are in
zero_pp_rank_DD_mp_rank_MM_optim_states.pt, one file a replica; along a pipe one file a layer and tensor rank.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.engine.process import deepspeed  # noqa: F401 (imported first: it keeps DeepSpeed quiet)
from megatron_adalrs.model.gpt import GPT, VOCABULARY_TABLES
from megatron_adalrs.model.pipeline import pipeline_layers
from megatron_adalrs.parallel.layers import shard_of
from megatron_adalrs.parallel.layout import Layout
from megatron_adalrs.parallel.topology import Axis

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler  # isort: skip
from deepspeed.runtime.zero.config import ZeroStageEnum  # isort: skip

HARMLESS = [LossScaler, DynamicLossScaler, ZeroStageEnum]
"""What else than tensors and plain values is in the files that are read: without code to run."""
Part = Mapping[str, Callable[[], Tensor]]
"""A tensor rank's parameters by GPT's names. Read when called: files are mapped into memory, not loaded."""


class SavedWeights:
    """The parameters in a folder that `Engine.save` wrote, by GPT's names: a `WeightSource`.

    Args:
        model, vocab_size: of the model that was saved; `vocab_size` before padding.
        zero_stage: under which it was saved.
        pipe, tensor: sizes of these axes then.

    Raises:
        ValueError: a file is missing or cannot be read, or lacks a parameter.
    """

    def __init__(
        self, folder: Path, model: ModelConfig, vocab_size: int, zero_stage: int, pipe: int, tensor: int
    ) -> None:
        self._vocab_size = vocab_size
        with torch.device("meta"):
            gpt = GPT(model, vocab_size, Layout(tensor=Axis(0, tensor)))
            layers = [layer.name for layer in pipeline_layers(model, vocab_size)]
        self._shards = {name: shard_of(parameter) for name, parameter in gpt.named_parameters()}
        read = partial(_of_pipe, layers=layers) if pipe > 1 else _of_masters if zero_stage == 3 else _of_module
        self._parts: list[Part] = [read(folder, index) for index in range(tensor)]
        for part in self._parts:
            if lacking := self._shards.keys() - part.keys():
                raise ValueError(f"{folder} lacks {', '.join(sorted(lacking))}")

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        """The whole parameter, on the processor, in the precision it was saved in."""
        shard = self._shards[name]
        whole = shard.joined([part[name]() for part in self._parts]) if shard else self._parts[0][name]()
        whole = whole[: self._vocab_size] if name in VOCABULARY_TABLES else whole
        assert whole.shape == torch.Size(shape), f"{name} is {tuple(whole.shape)}, not {tuple(shape)}"
        return whole


def _of_module(folder: Path, index: int) -> Part:
    weights = _read(folder / f"mp_rank_{index:02d}_model_states.pt")["module"]
    return {name: partial(weights.__getitem__, name) for name in weights}


def _of_pipe(folder: Path, index: int, layers: Sequence[str]) -> Part:
    found = {}
    for number, layer in enumerate(layers):
        weights = _read(folder / f"layer_{number:02d}-model_{index:02d}-model_states.pt")
        found |= {f"{layer}.{name}": partial(weights.__getitem__, name) for name in weights}
    return found


def _of_masters(folder: Path, index: int) -> Part:
    """Replica r has the r-th of equal parts of every parameter, one after the other, as in zero_to_fp32.py."""
    shapes = _read(folder / f"zero_pp_rank_0_mp_rank_{index:02d}_model_states.pt")["param_shapes"]
    replicas = []
    for rank in count():
        # In bf16 the name begins with that.
        file = next(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_{index:02d}_optim_states.pt"), None)
        if file is None:
            break
        replicas.append(_read(file)["optimizer_state_dict"]["fp32_flat_groups"])
    if not replicas:
        raise ValueError(f"{folder} has no zero_pp_rank_0_mp_rank_{index:02d}_optim_states.pt")
    found, start = {}, 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        length = math.ceil(shape.numel() / len(replicas))
        found[name] = partial(_gathered, replicas, start, length, shape)
        start += length
    return found


def _gathered(replicas: Sequence[Sequence[Tensor]], start: int, length: int, shape: torch.Size) -> Tensor:
    """A parameter from its parts, which begin at `start` of each replica's flat tensors; none goes over two of them."""
    parts = []
    for flats in replicas:
        first = start
        for flat in flats:
            if first < flat.numel():
                parts.append(flat[first : first + length])
                break
            first -= flat.numel()
    return torch.cat(parts)[: shape.numel()].view(shape)


def _read(file: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(str(file), map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot read {file}: {str(error).splitlines()[0]}") from None
