"""Weight decay by parameter and the settings of AdamW."""

from __future__ import annotations

from torch import nn

from megatron_adalrs.optim.optimizer import build_optimizer
from tests.helpers.runs import tiny_config


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    optimizer = build_optimizer(model, tiny_config(weight_decay=0.3, adam_beta2=0.9).optimizer)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.3, 0.0, 0.0, 0.3, 0.0]
    assert optimizer.defaults["betas"] == (0.9, 0.9)
