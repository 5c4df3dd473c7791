"""Memory of a rank in each phase of a step, as DeepSpeed 0.19.8 allocates it (measured by the tests)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_adalrs.config import Config
from megatron_adalrs.distributed.process_mesh import MeshShape
from megatron_adalrs.engine import reduce_bucket_size
from megatron_adalrs.engine.deepspeed_config import deepspeed_settings
from megatron_adalrs.planning.activations import FLOAT, Activations, activations_of, bytes_of_element
from megatron_adalrs.planning.parts import Part, parts_of_stages
from megatron_adalrs.snapshot.engine_snapshot import estimate_snapshot_bytes

FLATTENED = 500_000_000
"""Elements of gradients that DeepSpeed copies into one all-reduce buffer without ZeRO."""
UNFUSED_LARGEST, UNFUSED_FLAT = 3, 2
"""Temporaries of unfused AdamW: fp32 copies of the largest parameter, or with ZeRO of the flat shard."""
ZERO3_DEFAULTS = {
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
}


@dataclass(frozen=True)
class RankPlan:
    """Estimated memory of each rank of one pipeline stage: the maximum of each kind, in bytes."""

    part: Part
    weights: int
    gradients: int
    optimizer: int
    """fp32 master weights, if there are any, and the two moments of AdamW."""
    activations: int
    """Activations of all micro-batches in flight, gradients of the loss, and temporaries of the passes."""
    buffers: int
    """Buffers that DeepSpeed gathers gradients in and, with ZeRO-3, parameters."""
    peak: int
    """Maximum at one time; less than the sum, since activations are freed before the optimizer step."""
    offloaded: int
    """Bytes in host memory instead of device memory, with ZeRO-Offload."""
    snapshot: int
    """Bytes in host memory for all snapshots that AdaLRS and the loss guard hold at one time."""


@dataclass(frozen=True)
class RunPlan:
    """Estimated memory and schedule of a run."""

    config: Config
    shape: MeshShape
    vocab_size: int
    """Size of the vocabulary without padding."""
    stages: tuple[RankPlan, ...]
    on_cpu: bool

    @property
    def global_batch_size(self) -> int:
        """Samples of a step."""
        return self.config.global_batch_size(self.shape.data)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a rank in a step."""
        return self.config.micro_batches_per_step(self.shape.data)

    @property
    def bubble(self) -> float:
        """Fraction of a step in which a stage is idle.

        (p - 1) / (m + p - 1) for p stages and m micro-batches (arXiv 1811.06965, section 2.3).
        """
        waiting = self.shape.pipe - 1
        return waiting / (self.micro_batches + waiting)


def plan_run(config: Config, vocab_size: int, shape: MeshShape, on_cpu: bool) -> RunPlan:
    """Estimate the memory of a run on a mesh that need not exist.

    Args:
        vocab_size: Size of the vocabulary without padding.
        on_cpu: Ranks compute on CPUs, whose kernels are less fused and need more memory.

    Raises:
        ValueError: The batch does not fit the mesh, or a DeepSpeed setting contradicts a flag.
    """
    settings = deepspeed_settings(config, shape.data)["zero_optimization"]
    activations = activations_of(config, vocab_size, shape, on_cpu)
    parts = parts_of_stages(config, vocab_size, shape)
    stages = tuple(
        _rank_plan(config, shape, part, _passes(config, shape, activations, part, stage), settings, on_cpu)
        for stage, part in enumerate(parts)
    )
    return RunPlan(config, shape, vocab_size, stages, on_cpu)


@dataclass(frozen=True)
class _Passes:
    """Activations of a rank: their peak, and those during the backward pass of the last block."""

    peak: int
    tail: int


def _passes(config: Config, shape: MeshShape, sizes: Activations, part: Part, stage: int) -> _Passes:
    # 1F1B: a stage runs as many forward passes ahead as there are stages from it to the end (arXiv
    # 1806.03377).
    in_flight = min(shape.pipe - stage, config.micro_batches_per_step(shape.data))
    each = part.blocks * sizes.block
    each += sizes.embedding if part.has_embedding else 0
    # The output that was sent to the next stage is kept for the backward pass.
    each += sizes.output if part.has_output else sizes.residual
    # DeepSpeed receives into at least two buffers; the first block keeps a copy.
    received = 0 if part.has_embedding else (max(2, in_flight) + 2) * sizes.residual
    sent = 0 if part.has_output else sizes.residual
    backward = sizes.rerun + sizes.backward
    grow = max(backward, sizes.loss) if part.has_output else backward
    return _Passes(in_flight * each + received + sent + grow, backward)


@dataclass(frozen=True)
class _State:
    """Memory of a rank without activations, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    backward: int
    """Gradients and buffers that exist when the activations reach their peak."""
    complete: int
    """Gradients and buffers that exist at the end of the backward pass."""
    reduction: int
    """Peak of gradients and buffers while gradients are reduced."""
    update: int
    """Peak of gradients and temporaries during the optimizer step."""


def _rank_plan(
    config: Config, shape: MeshShape, part: Part, passes: _Passes, settings: dict[str, Any], on_cpu: bool
) -> RankPlan:
    replicas = shape.data * shape.context
    accumulates = config.micro_batches_per_step(shape.data) > 1
    unit = bytes_of_element(config)
    if config.training.zero_stage == 0:
        state = _without_zero(part, unit, replicas, accumulates, on_cpu)
    elif config.training.zero_stage == 3:
        state = _zero3(part, unit, replicas, settings, on_cpu)
    else:
        state = _zero1_or_2(config.training.zero_stage, part, unit, replicas, accumulates, settings, on_cpu)
    offloads = {
        name: settings.get(f"offload_{name}", {}).get("device", "none") == "cpu"
        for name in ("optimizer", "param")
    }
    offloaded = state.optimizer + FLOAT * _shard(part, replicas) if offloads["optimizer"] else 0
    weights_offloaded = unit * _shard(part, replicas) if offloads["param"] else 0
    peak = max(
        state.backward + passes.peak,
        state.complete + passes.tail,
        state.reduction,
        0 if offloaded else state.update,
    )
    held = state.weights - weights_offloaded + (0 if offloaded else state.optimizer)
    snapshot = estimate_snapshot_bytes(config.training, part.parameters, replicas)
    return RankPlan(
        part=part,
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=passes.peak,
        buffers=state.buffers,
        peak=held + peak,
        offloaded=offloaded + weights_offloaded,
        snapshot=snapshot * config.live_snapshots,
    )


def _shard(part: Part, replicas: int) -> int:
    return math.ceil(part.parameters / replicas)


def _without_zero(part: Part, unit: int, replicas: int, accumulates: bool, on_cpu: bool) -> _State:
    """PyTorch's AdamW; in low precision FP16_UnfusedOptimizer on master weights with fp32 gradients."""
    parameters, low_precision = part.parameters, unit < FLOAT
    gradients = unit * parameters
    buffers = unit * min(parameters, FLATTENED) if replicas > 1 else 0
    in_update = gradients + (FLOAT * parameters if low_precision else 0)
    return _State(
        weights=unit * (parameters + part.buffers),
        gradients=in_update,
        optimizer=(3 if low_precision else 2) * FLOAT * parameters,
        buffers=buffers,
        # With a single micro-batch, gradients replace activations layer by layer.
        backward=gradients if accumulates else 0,
        complete=gradients,
        reduction=gradients + buffers,
        update=in_update + (UNFUSED_LARGEST * FLOAT * max(part.sizes) if on_cpu else 0),
    )


def _zero1_or_2(
    stage: int,
    part: Part,
    unit: int,
    replicas: int,
    accumulates: bool,
    settings: dict[str, Any],
    on_cpu: bool,
) -> _State:
    """DeepSpeedZeroOptimizer. Stage 1 accumulates all gradients, stage 2 its shard of them."""
    parameters, shard = part.parameters, _shard(part, replicas)
    bucket = unit * int(settings.get("reduce_bucket_size", reduce_bucket_size(parameters)))
    accumulated = unit * (parameters if stage == 1 else shard) if accumulates else 0
    copies = 2 if stage == 2 else 1  # stage 2 reduces a copy of the bucket
    # A bucket smaller than the gradients is reduced in the middle of the backward pass.
    reduces_midway = bucket < unit * parameters
    backward = accumulated + (copies if reduces_midway else 1) * bucket
    in_update = (unit + FLOAT) * shard
    return _State(
        weights=unit * (parameters + part.buffers),
        gradients=max(accumulated, in_update),
        optimizer=3 * FLOAT * shard,
        buffers=copies * bucket,
        backward=backward,
        complete=backward,
        reduction=copies * bucket + (accumulated if stage == 1 else unit * shard),
        update=in_update + (UNFUSED_FLAT * FLOAT * shard if on_cpu else 0),
    )


def _zero3(part: Part, unit: int, replicas: int, settings: dict[str, Any], on_cpu: bool) -> _State:
    """DeepSpeedZeroOptimizer_Stage3: parameters are gathered for the passes; small ones stay gathered."""

    def setting(name: str) -> int:
        return int(settings.get(name, ZERO3_DEFAULTS[name]))

    shard = _shard(part, replicas)
    bucket = unit * int(settings.get("reduce_bucket_size", reduce_bucket_size(part.parameters)))
    resident = sum(size for size in part.sizes if size <= setting("stage3_param_persistence_threshold"))
    others = part.parameters - resident
    gathered = unit * min(others, setting("stage3_max_live_parameters"))
    fetched = unit * min(others, setting("stage3_prefetch_bucket_size"))
    always = bucket + unit * shard  # the shard of the gradients is allocated once
    return _State(
        weights=unit * (shard + resident + part.buffers),
        gradients=(unit + FLOAT) * shard,
        optimizer=3 * FLOAT * shard,
        buffers=bucket + gathered + fetched,
        backward=always + gathered,
        complete=always + gathered,
        reduction=always + gathered + fetched,
        update=always + FLOAT * shard + (UNFUSED_FLAT * FLOAT * shard if on_cpu else 0),
    )
