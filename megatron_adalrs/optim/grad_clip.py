"""Gradient clipping by global norm (arXiv 1211.5063), where DeepSpeed does not do it.

With ZeRO or in low precision DeepSpeed clips (`gradient_clipping`, which `engine/deepspeed_config.py` sets).
In fp32 without ZeRO, its data-parallel engine does not report the norm, and its pipeline engine clips by the
norm of the first stage alone; the engines call the functions of this module instead. In all cases the
threshold is `--clip-grad`, and the norm is reported from before clipping.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from megatron_adalrs.config import TrainingConfig
from megatron_adalrs.distributed.collectives import gather_numbers
from megatron_adalrs.distributed.process_mesh import MeshAxis, ProcessMesh
from megatron_adalrs.parallel.layers import shard_of
from megatron_adalrs.parallel.mappings import all_reduce


def clips_outside_deepspeed(training: TrainingConfig) -> bool:
    """Return whether the engine clips instead of DeepSpeed: in fp32 without ZeRO."""
    return training.zero_stage == 0 and training.precision == "fp32"


def clip_grad_norm(parameters: Sequence[nn.Parameter], clip_grad: float, tensor: MeshAxis) -> Tensor:
    """Clip gradients by their norm over all shards of a tensor-parallel group. Collective of the group.

    Args:
        parameters: the parameters of this rank.
        clip_grad: the maximum norm; 0 computes the norm without clipping.
        tensor: the tensor axis. Parameters that are not sharded along it count once.

    Returns:
        The global norm before clipping, a scalar.
    """
    max_norm = clip_grad or float("inf")
    if tensor.size == 1:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    norm = all_reduce(nn.utils.get_total_norm(_counted_gradients(parameters, tensor)).square(), tensor).sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def clip_pipeline_grad_norm(
    parameters: Sequence[nn.Parameter], clip_grad: float, mesh: ProcessMesh, device: torch.device
) -> float:
    """Clip gradients by their norm over all stages and shards of a pipeline. Collective of all ranks.

    Args:
        parameters: the parameters of this rank's stage. A tied weight counts on one of its stages.
        clip_grad: the maximum norm; 0 computes the norm without clipping.

    Returns:
        The global norm before clipping, the same float on every rank.
    """
    own = [p for p in parameters if not getattr(p, "ds_pipe_replicated", False)]
    gradients = _counted_gradients(own, mesh.tensor)
    squares = [gradient.float().square().sum(dtype=torch.float64) for gradient in gradients]
    local = float(torch.stack(squares).sum()) if squares else 0.0
    # Data-parallel replicas hold the same gradients. Averaging their sums in rank order gives the same bits
    # on every rank.
    total = float(gather_numbers([local], device).sum()) / mesh.data.size
    norm: float = total**0.5
    norm_tensor = torch.tensor(norm, dtype=torch.float32, device=device)
    nn.utils.clip_grads_with_norm_(parameters, clip_grad or float("inf"), norm_tensor)
    return norm


def _counted_gradients(parameters: Iterable[nn.Parameter], tensor: MeshAxis) -> list[Tensor]:
    """Return the gradients that this rank adds to the norm: its shards, and on the first rank the rest."""
    return [p.grad for p in parameters if p.grad is not None and (tensor.is_first or shard_of(p))]
