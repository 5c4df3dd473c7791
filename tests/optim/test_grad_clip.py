"""Gradient clipping in one process: the norm that is returned, and the gradients that are left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_adalrs.distributed.process_mesh import ONE_RANK
from megatron_adalrs.optim.grad_clip import clip_grad_norm, clips_outside_deepspeed
from tests.helpers.runs import tiny_config


def parameters_with_gradients() -> list[nn.Parameter]:
    """Two parameters whose gradients have the global norm 5."""
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.tensor([0.0, 3.0])
    parameters[1].grad = torch.tensor([-4.0])
    return parameters


@pytest.mark.parametrize(("clip_grad", "left"), [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
def test_gradients_are_scaled_to_the_threshold(clip_grad: float, left: float) -> None:
    parameters = parameters_with_gradients()
    assert clip_grad_norm(parameters, clip_grad, ONE_RANK).item() == pytest.approx(5.0)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    assert norm.item() == pytest.approx(left, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "expected"),
    [({}, True), ({"zero_stage": 1}, False), ({"bf16": True}, False), ({"fp16": True}, False)],
    ids=str,
)
def test_only_fp32_without_zero_clips_here(values: dict[str, object], expected: bool) -> None:
    assert clips_outside_deepspeed(tiny_config(**values).training) is expected
