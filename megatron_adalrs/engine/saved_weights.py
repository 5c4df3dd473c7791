"""Weights in the checkpoint files of an engine with any mesh and ZeRO stage.

Files of DeepSpeed 0.19.8: without pipeline parallelism mp_rank_MM_model_states.pt, one file per tensor rank,
with the module's weights in its precision. With ZeRO-3 these are empty, and the fp32 masters are in
zero_pp_rank_DD_mp_rank_MM_optim_states.pt, one file per replica. With pipeline parallelism, one file per
layer and tensor rank.
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

SAFE_GLOBALS = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
"""Classes in the files besides tensors and plain values. Unpickling them runs no code."""
Part = Mapping[str, Callable[[], Tensor]]
"""A tensor rank's parameters by GPT's names, each read when it is called."""


class SavedParameters:
    """A `WeightSource` that joins the parts of all tensor ranks.

    Args:
        folder: the folder that is named in errors.
        model: the shape of the model that was saved.
        vocab_size: size of its vocabulary before padding.
        parts: the parameters of each tensor rank, which may be flat.

    Raises:
        ValueError: a parameter is missing.
    """

    def __init__(self, folder: Path, model: ModelConfig, vocab_size: int, parts: Sequence[Part]) -> None:
        self._vocab_size = vocab_size
        self._parts = parts
        with torch.device("meta"):
            gpt = GPT(model, vocab_size, Layout(tensor=MeshAxis(0, len(parts))))
        self._held = {
            name: (parameter.shape, shard_of(parameter)) for name, parameter in gpt.named_parameters()
        }
        for part in parts:
            if missing := self._held.keys() - part.keys():
                raise ValueError(f"{folder} lacks {', '.join(sorted(missing))}")

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return the whole tensor, on the CPU, in the precision in which it was saved."""
        held, shard = self._held[name]
        parts = [part[name]().view(held) for part in (self._parts if shard else self._parts[:1])]
        whole = shard.joined(parts) if shard else parts[0]
        whole = whole[: self._vocab_size] if name in VOCABULARY_TABLES else whole
        assert whole.shape == torch.Size(shape), f"{name} is {tuple(whole.shape)}, not {tuple(shape)}"
        return whole


class SavedWeights(SavedParameters):
    """The weights in a folder that `Engine.save` wrote.

    Args:
        folder: the folder.
        model: the shape of the model that was saved.
        vocab_size: size of its vocabulary before padding.
        zero_stage: ZeRO stage of the engine that saved it.
        pipe: number of its pipeline stages.
        tensor: number of its tensor ranks.

    Raises:
        ValueError: a file or a parameter is missing, or a file cannot be read.
    """

    def __init__(
        self, folder: Path, model: ModelConfig, vocab_size: int, zero_stage: int, pipe: int, tensor: int
    ) -> None:
        layers = [layer.name for layer in pipeline_layers(model, vocab_size)]
        read: Callable[[Path, int], Part] = _zero3_masters if zero_stage == 3 else module_weights
        if pipe > 1:
            read = partial(pipeline_weights, layers=layers)
        super().__init__(folder, model, vocab_size, [read(folder, index) for index in range(tensor)])


def module_weights(folder: Path, index: int) -> Part:
    """Return the weights of a tensor rank, saved without pipeline parallelism."""
    weights = read_saved(folder / f"mp_rank_{index:02d}_model_states.pt")["module"]
    return {name: partial(weights.__getitem__, name) for name in weights}


def pipeline_weights(folder: Path, index: int, layers: Sequence[str]) -> Part:
    """Return the weights of a tensor rank, saved from a pipeline of these layers."""
    found: dict[str, Callable[[], Tensor]] = {}
    for number, layer in enumerate(layers):
        weights = read_saved(folder / f"layer_{number:02d}-model_{index:02d}-model_states.pt")
        found |= {f"{layer}.{name}": partial(weights.__getitem__, name) for name in weights}
    return found


def _zero3_masters(folder: Path, index: int) -> Part:
    """Return the masters of a tensor rank under ZeRO-3.

    Replica r has the r-th of equal parts of every parameter, in order. Source: DeepSpeed's zero_to_fp32.py.
    """
    replicas = [optimizer["fp32_flat_groups"] for optimizer in sharded_optimizers(folder, index)]
    return parameters_of_flat_tensors(folder, index, replicas)


def sharded_optimizers(folder: Path, index: int) -> list[dict[str, Any]]:
    """Return the ZeRO optimizer state of each replica of a model-parallel rank, in order.

    Raises:
        ValueError: there is no file, or one cannot be read.
    """
    replicas: list[dict[str, Any]] = []
    for rank in count():
        # In bf16 the name begins with "bf16_".
        file = next(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_{index:02d}_optim_states.pt"), None)
        if file is None:
            break
        replicas.append(read_saved(file)["optimizer_state_dict"])
    if not replicas:
        raise ValueError(f"{folder} has no zero_pp_rank_0_mp_rank_{index:02d}_optim_states.pt")
    return replicas


def parameters_of_flat_tensors(folder: Path, index: int, replicas: Sequence[Sequence[Tensor]]) -> Part:
    """Return ZeRO-3's parameters, or their moments, from the flat tensors of every replica."""
    shapes = read_saved(folder / f"zero_pp_rank_0_mp_rank_{index:02d}_model_states.pt")["param_shapes"]
    found, start = {}, 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        length = math.ceil(shape.numel() / len(replicas))
        found[name] = partial(_gathered, replicas, start, length, shape)
        start += length
    return found


def _gathered(replicas: Sequence[Sequence[Tensor]], start: int, length: int, shape: torch.Size) -> Tensor:
    """Join a parameter from its parts, each within one flat tensor of a replica.

    Args:
        replicas: the flat tensors of each replica.
        start: first element of the part, counted over the replica's flat tensors.
        length: elements of the part, with padding.
        shape: shape of the parameter.
    """
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
    """Read a file of DeepSpeed's with its tensors mapped into memory.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            saved: dict[str, Any] = torch.load(str(file), map_location="cpu", mmap=True, weights_only=True)
            return saved
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot read {file}: {first_line(error)}") from None
