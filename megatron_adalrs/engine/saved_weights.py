"""Weights alone, from what an engine saved, whatever the mesh and the ZeRO stage that it had.

What DeepSpeed 0.19.8 writes: without a pipe mp_rank_MM_model_states.pt, one file a tensor rank, with the
module's weights in its precision; under ZeRO-3 these are empty, and the fp32 masters are in
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
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.distributed.process_mesh import MeshAxis
from megatron_adalrs.model.gpt import GPT
from megatron_adalrs.model.initialization import VOCABULARY_TABLES
from megatron_adalrs.model.pipeline import pipeline_layers
from megatron_adalrs.parallel.layers import shard_of
from megatron_adalrs.parallel.layout import Layout
from megatron_adalrs.utils.format import first_line

HARMLESS = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
"""What else than tensors and plain values is in the files that are read: without code to run."""
Part = Mapping[str, Callable[[], Tensor]]
"""A tensor rank's parameters by GPT's names. Read when called: files are mapped into memory, not loaded."""


class SavedParameters:
    """Whole tensors of the parameters' shapes, by GPT's names, from every tensor rank's parts: a
    `WeightSource`.

    Args:
        model, vocab_size: of the model that was saved; `vocab_size` before padding.
        parts: one a tensor rank; a tensor may be flat.

    Raises:
        ValueError: a parameter is lacking.
    """

    def __init__(self, folder: Path, model: ModelConfig, vocab_size: int, parts: Sequence[Part]) -> None:
        self._vocab_size, self._parts = vocab_size, parts
        with torch.device("meta"):
            gpt = GPT(model, vocab_size, Layout(tensor=MeshAxis(0, len(parts))))
        self._held = {
            name: (parameter.shape, shard_of(parameter)) for name, parameter in gpt.named_parameters()
        }
        for part in parts:
            if lacking := self._held.keys() - part.keys():
                raise ValueError(f"{folder} lacks {', '.join(sorted(lacking))}")

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        """The whole tensor, on the processor, in the precision it was saved in."""
        held, shard = self._held[name]
        parts = [part[name]().view(held) for part in (self._parts if shard else self._parts[:1])]
        whole = shard.joined(parts) if shard else parts[0]
        whole = whole[: self._vocab_size] if name in VOCABULARY_TABLES else whole
        assert whole.shape == torch.Size(shape), f"{name} is {tuple(whole.shape)}, not {tuple(shape)}"
        return whole


class SavedWeights(SavedParameters):
    """The parameters in a folder that `Engine.save` wrote.

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
        layers = [layer.name for layer in pipeline_layers(model, vocab_size)]
        read = partial(of_pipe, layers=layers) if pipe > 1 else _of_masters if zero_stage == 3 else of_module
        super().__init__(folder, model, vocab_size, [read(folder, index) for index in range(tensor)])


def of_module(folder: Path, index: int) -> Part:
    """The weights of a tensor rank, without a pipe."""
    weights = read_saved(folder / f"mp_rank_{index:02d}_model_states.pt")["module"]
    return {name: partial(weights.__getitem__, name) for name in weights}


def of_pipe(folder: Path, index: int, layers: Sequence[str]) -> Part:
    """The weights of a tensor rank, along a pipe of these layers."""
    found = {}
    for number, layer in enumerate(layers):
        weights = read_saved(folder / f"layer_{number:02d}-model_{index:02d}-model_states.pt")
        found |= {f"{layer}.{name}": partial(weights.__getitem__, name) for name in weights}
    return found


def _of_masters(folder: Path, index: int) -> Part:
    """Replica r has the r-th of equal parts of every parameter, one after the other, as in
    zero_to_fp32.py."""
    replicas = [optimizer["fp32_flat_groups"] for optimizer in sharded_optimizers(folder, index)]
    return parts_of_flats(folder, index, replicas)


def sharded_optimizers(folder: Path, index: int) -> list[dict[str, Any]]:
    """What ZeRO's optimizer saved on each replica of a model-parallel rank, in their order.

    Raises:
        ValueError: there is none, or a file cannot be read.
    """
    replicas: list[dict[str, Any]] = []
    for rank in count():
        # In bf16 the name begins with that.
        file = next(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_{index:02d}_optim_states.pt"), None)
        if file is None:
            break
        replicas.append(read_saved(file)["optimizer_state_dict"])
    if not replicas:
        raise ValueError(f"{folder} has no zero_pp_rank_0_mp_rank_{index:02d}_optim_states.pt")
    return replicas


def parts_of_flats(folder: Path, index: int, replicas: Sequence[Sequence[Tensor]]) -> Part:
    """ZeRO-3's parameters, or their moments, from every replica's flat tensors."""
    shapes = read_saved(folder / f"zero_pp_rank_0_mp_rank_{index:02d}_model_states.pt")["param_shapes"]
    found, start = {}, 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        length = math.ceil(shape.numel() / len(replicas))
        found[name] = partial(_gathered, replicas, start, length, shape)
        start += length
    return found


def _gathered(replicas: Sequence[Sequence[Tensor]], start: int, length: int, shape: torch.Size) -> Tensor:
    """A parameter from its parts, which begin at `start` of each replica's flat tensors; none goes over two
    of them."""
    parts = []
    for flats in replicas:
        first = start
        for flat in flats:
            if first < flat.numel():
                parts.append(flat[first : first + length])
                break
            first -= flat.numel()
    return torch.cat(parts)[: shape.numel()].view(shape)


def read_saved(file: Path) -> dict[str, Any]:
    """A file of DeepSpeed's, its tensors mapped into memory. Raises ValueError if that cannot be done."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(str(file), map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot read {file}: {first_line(error)}") from None
