"""Initial weights: their scale, and that they depend on the name and the seed only."""

from __future__ import annotations

import pytest
import torch

from megatron_adalrs.model.gpt import GPT
from megatron_adalrs.model.initialization import init_weights
from tests.model.models import build


def test_initial_weights() -> None:
    model, _ = build("gpt2-tiny", hidden_size=128, num_layers=8)
    block = model.blocks[3]
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attention.output.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert block.mlp.output.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert torch.all(block.mlp.input.bias == 0)
    assert torch.all(model.final_norm.weight == 1)


def test_weights_depend_on_name_and_seed_only() -> None:
    deep, config = build("llama-tiny", num_layers=3)
    shallow, _ = build("llama-tiny", num_layers=1, init_method_std=0.02)
    assert torch.equal(deep.blocks[0].attention.qkv.weight, shallow.blocks[0].attention.qkv.weight)
    assert not torch.equal(deep.blocks[0].attention.qkv.weight, deep.blocks[1].attention.qkv.weight)
    again = GPT(config, 64)
    init_weights(again, config, seed=4)
    assert not torch.equal(deep.blocks[0].attention.qkv.weight, again.blocks[0].attention.qkv.weight)
