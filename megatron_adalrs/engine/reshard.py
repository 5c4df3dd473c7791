"""Resharding: training state of another mesh or ZeRO stage, written into an engine.

DeepSpeed's `safe_set_full_optimizer_state` covers only a part of this: it supports no optimizer without ZeRO,
needs the moments, which are allocated in the first step, and fails where ZeRO-3 pads a parameter. So tensors
are written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megatron_adalrs.model.initialization import WeightSource, local_part

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainingTensors:
    """The state of AdamW as whole fp32 tensors by GPT's names."""

    masters: WeightSource
    moments: Mapping[str, WeightSource]
    """Sources by AdamW's names of the moments; empty before the first step."""
    step: float
    """AdamW's own step count, with which it corrects the bias of the moments."""
    counters: Mapping[str, int]
    """DeepSpeed's `global_steps`, `global_samples` and `skipped_steps`."""


class Fragment(NamedTuple):
    """Position of a parameter, or of this rank's part of it, in a tensor of the optimizer."""

    owner: Tensor
    """The tensor that the optimizer updates; its moments have the same shape."""
    at: int
    """First element of the part in the owner."""
    first: int
    """First element of the part in the parameter, which is the rank's tensor shard."""
    length: int
    """Elements of the part, at most: ZeRO-3 pads the last part."""


@torch.no_grad()
def write_training_state(
    optimizer: Any,
    base: torch.optim.Optimizer,
    weights: Mapping[str, nn.Parameter],
    vocab_size: int,
    saved: TrainingTensors,
) -> None:
    """Write masters, moments and step. The caller recomputes weights that are rounded masters.

    Args:
        optimizer: DeepSpeed's optimizer.
        base: the optimizer that it wraps, or the same.
        weights: this rank's parameters by GPT's names.
        vocab_size: size of the vocabulary before padding.
        saved: the state to write.
    """
    locate = _locate_fragments(optimizer)
    for name, parameter in weights.items():
        fragment = locate(parameter)
        if fragment is None:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 the parameter itself is empty
        _write(fragment.owner, fragment, local_part(saved.masters, name, parameter, shape, vocab_size))
        if not saved.moments:
            continue
        state = _state_of(base, fragment.owner)
        for moment, source in saved.moments.items():
            _write(state[moment], fragment, local_part(source, name, parameter, shape, vocab_size))
        if torch.is_tensor(state["step"]):
            state["step"].fill_(saved.step)
        else:
            state["step"] = int(saved.step)


def _locate_fragments(optimizer: Any) -> Callable[[nn.Parameter], Fragment | None]:
    """Return a function that locates a parameter; it returns None if the parameter is not on this rank.

    Sources: the optimizer classes named below (DeepSpeed 0.19.8).
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):

        def in_shards(parameter: nn.Parameter) -> Fragment:
            group, at, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            first = length * optimizer._get_param_partition_rank(parameter)
            return Fragment(optimizer.fp32_partitioned_groups_flat[group], at, first, length)

        return in_shards
    if isinstance(optimizer, DeepSpeedZeroOptimizer):

        def in_partition(parameter: nn.Parameter) -> Fragment | None:
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's attribute
            if mapping is None:
                return None
            owner = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            in_owner = mapping.hp_fragment_address
            in_parameter = mapping.lp_fragment_address
            return Fragment(owner, in_owner.start, in_parameter.start, in_parameter.numel)

        return in_partition
    masters: dict[int, Tensor] = {}
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        for fp16, fp32 in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            masters |= {id(weight): master for weight, master in zip(fp16, fp32, strict=True)}

    def whole(parameter: nn.Parameter) -> Fragment:
        return Fragment(masters.get(id(parameter), parameter), 0, 0, parameter.numel())

    return whole


def _write(tensor: Tensor, fragment: Fragment, part: Tensor) -> None:
    values = part.flatten()[fragment.first : fragment.first + fragment.length]
    tensor.data.view(-1)[fragment.at : fragment.at + values.numel()].copy_(values)


def _state_of(base: torch.optim.Optimizer, owner: Tensor) -> dict[str, Any]:
    """Return the optimizer's state of a tensor; create it as AdamW does in its first step."""
    state: dict[str, Any] = base.state[owner]
    if "step" not in state:
        on_device = any(group.get("fused") or group.get("capturable") for group in base.param_groups)
        state["step"] = torch.zeros((), dtype=torch.float32, device=owner.device if on_device else "cpu")
        state |= {moment: torch.zeros_like(owner, requires_grad=False) for moment in MOMENTS}
    return state
