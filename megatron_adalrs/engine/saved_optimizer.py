"""Masters, moments and step of AdamW in the checkpoint files of an engine with any mesh and ZeRO stage.

DeepSpeed's `ds_to_universal` (0.19.8) cannot be used for three reasons: it refuses a checkpoint without ZeRO;
it joins the parts of tensor ranks along one dimension, where ours consist of blocks ([q | k | v]); and it
identifies the layers of a pipeline by numbers that other pipelines do not share. This module reads the same
locations of parameters, `param_slice_mappings`.

Files of DeepSpeed, where MM counts tensor ranks fastest, then stages:
    without ZeRO    "optimizer" in mp_rank_MM_model_states.pt: torch's state dict, one state per parameter. In
                    bf16 the masters are beside it; in fp32 the weights are the masters.
    ZeRO 1, 2       (bf16_)zero_pp_rank_DD_mp_rank_MM_optim_states.pt: two flat tensors, one of decayed
                    parameters and one of the others, split at any element into one partition per replica
    ZeRO 3          the same file: flat tensors in which every parameter is split into equal parts
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.distributed.process_mesh import MeshAxis
from megatron_adalrs.engine.pipeline import TIED_WEIGHT, stage_bounds
from megatron_adalrs.engine.reshard import MOMENTS, TrainingTensors
from megatron_adalrs.engine.saved_weights import (
    Part,
    SavedParameters,
    module_weights,
    parameters_of_flat_tensors,
    pipeline_weights,
    read_saved,
    sharded_optimizers,
)
from megatron_adalrs.model.gpt import GPT
from megatron_adalrs.model.pipeline import pipeline_layers
from megatron_adalrs.parallel.layout import Layout

MASTER = "master"
COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class SavedMesh(NamedTuple):
    """Parallel layout with which a model was saved."""

    zero_stage: int
    pipe: int
    tensor: int
    partition: str
    """`ParallelConfig.pipeline_partition`."""


class _StageParameter(NamedTuple):
    """A parameter of a stage: its name in GPT, and whether it is a matrix."""

    name: str
    is_matrix: bool


Pieces = dict[str, dict[str, Callable[[], Tensor]]]
"""Tensors of a file or a model-parallel rank, by kind (`MASTER` or a moment) and GPT's name."""


def open_training_state(
    folder: Path, model: ModelConfig, vocab_size: int, mesh: SavedMesh
) -> TrainingTensors:
    """Open the training state in a folder that `Engine.save` wrote; tensors are read when they are used.

    Args:
        folder: the folder.
        model: the shape of the model that was saved.
        vocab_size: size of its vocabulary before padding.
        mesh: how it was split.

    Raises:
        ValueError: a file or a parameter is missing, a file cannot be read, or its format is not supported.
    """
    stages = _stages(model, vocab_size, mesh)
    ranks: list[Pieces] = []
    steps: list[float] = []
    for tensor_rank in range(mesh.tensor):
        pieces: Pieces = defaultdict(dict)
        for stage, held in enumerate(stages):
            index = stage * mesh.tensor + tensor_rank
            found, step = _READERS[mesh.zero_stage](folder, index, held)
            steps.append(step)
            for kind, parts in found.items():
                pieces[kind] |= parts
        if not pieces[MASTER]:
            pieces[MASTER] = dict(_weights(folder, model, vocab_size, mesh, tensor_rank))
        ranks.append(pieces)

    def whole(kind: str) -> SavedParameters:
        return SavedParameters(folder, model, vocab_size, [pieces[kind] for pieces in ranks])

    # With more ranks than parameters, a rank may have no state and no step count.
    step = max(steps)
    return TrainingTensors(
        whole(MASTER), {kind: whole(kind) for kind in MOMENTS if step}, step, _counters(folder, mesh)
    )


def _stages(model: ModelConfig, vocab_size: int, mesh: SavedMesh) -> list[dict[str, _StageParameter]]:
    """Return for each stage its parameters by DeepSpeed's names, in the order of the module."""
    layout = Layout(tensor=MeshAxis(0, mesh.tensor))
    with torch.device("meta"):
        if mesh.pipe == 1:
            gpt = GPT(model, vocab_size, layout)
            return [{name: _StageParameter(name, p.dim() > 1) for name, p in gpt.named_parameters()}]
        layers = pipeline_layers(model, vocab_size, layout)
        built = [list(layer.build().named_parameters()) for layer in layers]
    counts = [sum(parameter.numel() for _, parameter in parameters) for parameters in built]
    stages = []
    for start, stop in pairwise(stage_bounds(counts, mesh.pipe, mesh.partition)):
        # PipelineModule registers tied layers before the others.
        numbers = sorted(range(start, stop), key=lambda number: layers[number].tied_weight is None)
        names: dict[str, _StageParameter] = {}
        for number in numbers:
            prefix = f"tied_modules.{TIED_WEIGHT}" if layers[number].tied_weight else str(number)
            for name, parameter in built[number]:
                full_name = f"{layers[number].name}.{name}"
                names[f"{prefix}.{name}"] = _StageParameter(full_name, parameter.dim() > 1)
        stages.append(names)
    return stages


def _without_zero(folder: Path, index: int, held: Mapping[str, _StageParameter]) -> tuple[Pieces, float]:
    """Read a file saved without ZeRO.

    The optimizer numbers its parameters in the order of `optim.param_groups`: matrices come first.
    """
    saved = read_saved(folder / f"mp_rank_{index:02d}_model_states.pt")["optimizer"]
    masters = [master for group in saved.get("fp32_groups", []) for master in group]
    states = saved.get("optimizer_state_dict", saved)["state"]
    order = sorted(held.values(), key=lambda parameter: not parameter.is_matrix)
    pieces: Pieces = defaultdict(dict)
    for number, parameter in enumerate(order):
        if masters:
            pieces[MASTER][parameter.name] = partial(masters.__getitem__, number)
        for kind in MOMENTS if states else ():
            pieces[kind][parameter.name] = partial(states[number].__getitem__, kind)
    return pieces, _step(states.values())


def _in_partitions(folder: Path, index: int, held: Mapping[str, _StageParameter]) -> tuple[Pieces, float]:
    """Read files of ZeRO 1 and 2: the pieces of a parameter are in consecutive replicas."""
    cuts: dict[str, dict[str, list[Callable[[], Tensor]]]] = defaultdict(lambda: defaultdict(list))
    steps = []
    for optimizer in sharded_optimizers(folder, index):
        states = optimizer["base_optimizer_state"]["state"]
        steps.append(_step(states.values()))
        for group, mapping in enumerate(optimizer["param_slice_mappings"]):
            flats = {MASTER: optimizer["single_partition_of_fp32_groups"][group]}
            flats |= {kind: states[group][kind] for kind in MOMENTS if states.get(group)}
            for name, address in mapping.items():
                for kind, flat in flats.items():
                    cuts[kind][held[name].name].append(partial(flat.narrow, 0, address.start, address.numel))
    return {
        kind: {name: partial(_joined, cut) for name, cut in found.items()} for kind, found in cuts.items()
    }, max(steps)


def _in_shards(folder: Path, index: int, held: Mapping[str, _StageParameter]) -> tuple[Pieces, float]:
    """Read files of ZeRO 3, which does not support pipelines."""
    replicas = sharded_optimizers(folder, index)
    states = [replica["optimizer_state_dict"]["state"] for replica in replicas]
    masters = [replica["fp32_flat_groups"] for replica in replicas]
    pieces = {MASTER: dict(parameters_of_flat_tensors(folder, index, masters))}
    if all(states):
        for kind in MOMENTS:
            flats = [[state[number][kind] for number in sorted(state)] for state in states]
            pieces[kind] = dict(parameters_of_flat_tensors(folder, index, flats))
    return pieces, _step(states[0].values())


_READERS = {0: _without_zero, 1: _in_partitions, 2: _in_partitions, 3: _in_shards}


def _weights(folder: Path, model: ModelConfig, vocab_size: int, mesh: SavedMesh, tensor_rank: int) -> Part:
    if mesh.pipe == 1:
        return module_weights(folder, tensor_rank)
    return pipeline_weights(folder, tensor_rank, [layer.name for layer in pipeline_layers(model, vocab_size)])


def _counters(folder: Path, mesh: SavedMesh) -> dict[str, int]:
    """Return DeepSpeed's step counters.

    Raises:
        ValueError: optimizer state was offloaded or in another order, which changes the files.
    """
    prefix = "zero_pp_rank_0_" if mesh.zero_stage == 3 else ""
    saved = read_saved(folder / f"{prefix}mp_rank_00_model_states.pt")
    zero = saved["ds_config"].get("zero_optimization", {})
    for name in ("offload_optimizer", "offload_param", "round_robin_gradients"):
        if zero.get(name):
            raise ValueError(
                f"{folder} was written with zero_optimization.{name}: it can be resumed only on a mesh of "
                "the same shape and with the same ZeRO stage"
            )
    return {name: int(saved[name]) for name in COUNTERS}


def _step(states: Any) -> float:
    return max((float(state["step"]) for state in states if "step" in state), default=0.0)


def _joined(pieces: list[Callable[[], Tensor]]) -> Tensor:
    return torch.cat([piece() for piece in pieces])
