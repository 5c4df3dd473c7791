"""The state of a DeepSpeed engine that decides its following steps: tensors in place, and counters."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

COUNTERS = ("micro_steps", "global_steps", "global_samples", "skipped_steps")
LOSS_SCALER_COUNTERS = ("cur_scale", "cur_iter", "last_overflow_iter", "last_rescale_iter", "cur_hysteresis")


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer that DeepSpeed's optimizer wraps, or `optimizer` itself if it wraps none."""
    base: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return base


def training_state_tensors(module: nn.Module, optimizer: Any) -> dict[Hashable, Tensor]:
    """Return what the optimizer updates, the optimizer's state and the model's buffers.

    Weights that are rounded masters are left out, and no tensor occurs twice.

    Args:
        module: the model.
        optimizer: DeepSpeed's optimizer.

    Returns:
        The tensors themselves, valid between steps. The key of a tensor never changes, so that one that is
        allocated later, such as a moment in the first step, is recognised as new.
    """
    tensors: dict[Hashable, Tensor] = {
        ("buffer", name): buffer for name, buffer in _persistent_buffers(module)
    }
    for index, flat in enumerate(getattr(optimizer, "fp32_partitioned_groups_flat", [])):
        tensors["optimized", "shard", index] = flat
    base = base_optimizer(optimizer)
    # ZeRO-3 empties the parameter groups of the base optimizer between steps.
    optimized = [parameter for group in base.param_groups for parameter in group["params"]]
    known = {id(tensor) for tensor in tensors.values()}
    tensors |= {("optimized", index): p for index, p in enumerate(optimized) if id(p) not in known}
    for index, state in enumerate(base.state.values()):
        tensors |= {("state", index, name): value for name, value in state.items() if torch.is_tensor(value)}
    return tensors


def read_counters(deepspeed_engine: Any) -> dict[str, Any]:
    """Return the counters that decide the following steps.

    These are DeepSpeed's own, those of its loss scaler, and values in the optimizer's state that are no
    tensors.
    """
    values = {name: getattr(deepspeed_engine, name) for name in COUNTERS}
    base = base_optimizer(deepspeed_engine.optimizer)
    values["state"] = [_non_tensors(state) for state in base.state.values()]
    for owner in _loss_scalers(deepspeed_engine.optimizer):
        values |= {
            f"{type(owner).__name__}.{name}": getattr(owner, name)
            for name in LOSS_SCALER_COUNTERS
            if hasattr(owner, name)
        }
    return values


def write_counters(deepspeed_engine: Any, values: dict[str, Any]) -> None:
    """Set the counters that `read_counters` returned."""
    for name in COUNTERS:
        setattr(deepspeed_engine, name, values[name])
    base = base_optimizer(deepspeed_engine.optimizer)
    for index, state in enumerate(base.state.values()):
        saved = values["state"][index] if index < len(values["state"]) else {}
        # A value that did not exist when the counters were read is set to 0.
        state.update(dict.fromkeys(_non_tensors(state), 0) | saved)
    for owner in _loss_scalers(deepspeed_engine.optimizer):
        for name in LOSS_SCALER_COUNTERS:
            if (key := f"{type(owner).__name__}.{name}") in values:
                setattr(owner, name, values[key])


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that training may change; a module recomputes the others from its arguments."""
    for prefix, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


def _loss_scalers(optimizer: Any) -> list[Any]:
    """Return the objects that hold loss-scaler counters: the optimizer itself or its `loss_scaler`."""
    return [owner for owner in (optimizer, getattr(optimizer, "loss_scaler", None)) if owner is not None]


def _non_tensors(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not torch.is_tensor(value)}
