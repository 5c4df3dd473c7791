"""A refused update leaves weights and optimizer unchanged on every rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_adalrs.engine import Engine
from tests.helpers import runs
from tests.helpers.faults import Fault
from tests.helpers.ranks import Ranks
from tests.helpers.runs import micro_batches

CELLS = {
    "zero0-bf16": {"bf16": True},
    "zero1": {"zero_stage": 1},
    "zero2-bf16": {"zero_stage": 2, "bf16": True},
    "zero3": {"zero_stage": 3},
    "tensor": {"tensor_model_parallel_size": 2, "micro_batch_size": 4},
    "pipe": {"pipeline_model_parallel_size": 2},
    "pipe-zero1-bf16": {"pipeline_model_parallel_size": 2, "zero_stage": 1, "bf16": True},
}


def content(engine: Engine) -> list[torch.Tensor]:
    """Return copies of all tensors that decide the following steps, and of the weights."""
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    return [tensor.detach().clone() for tensor in [*engine.training_state_tensors().values(), *weights]]


def run(values: dict[str, Any]) -> None:
    """Run the same steps twice; the second time, failing or refused steps come between them on all ranks."""
    config, mesh, engine = runs.start(values)
    expected = [engine.train_batch(micro_batches(config, mesh, step)) for step in range(4)]
    assert all(result.applied for result in expected)

    config, mesh, engine = runs.start(values)
    fault = Fault(engine, rank=mesh.world_size - 1 if mesh.data.size > 1 else 0)
    asked: list[tuple[float, float]] = []

    def accept(loss: float, grad_norm: float) -> bool:
        asked.append((loss, grad_norm))
        return fault.kind != "refused" and math.isfinite(loss) and math.isfinite(grad_norm)

    steps = []
    for step in range(4):
        before = content(engine)
        for fault.kind in ("loss", "gradient", "refused"):
            result = engine.train_batch(micro_batches(config, mesh, 10 + step), accept=accept)
            assert not result.applied
            assert math.isfinite(result.loss) == (fault.kind != "loss")
            assert math.isfinite(result.grad_norm) == (fault.kind == "refused")
            if step:  # before the first one there is no optimizer state yet
                assert all(map(torch.equal, content(engine), before))
        assert asked[-1] == (result.loss, result.grad_norm)
        fault.kind = ""
        steps.append(engine.train_batch(micro_batches(config, mesh, step), accept=accept))
        assert asked[-1] == (steps[-1].loss, steps[-1].grad_norm)
    assert steps == expected


@pytest.mark.parametrize("name", CELLS)
def test_a_refused_update_changes_nothing(two_ranks: Ranks, name: str) -> None:
    """Includes a value that is not finite on one rank only, in the loss or in gradients."""
    two_ranks.run(run, CELLS[name])
