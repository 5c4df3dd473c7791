"""The model's parts against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.config import ModelConfig
from megatron_adalrs.model.gpt import GPT, count_parameters, flops_per_token, initialise

SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 12}


def model_config(preset: str, **values: Any) -> ModelConfig:
    run = {"train_iters": 10, "lr": 1e-3, "data_path": "d", "preset": preset}
    return config_from_values(run | SMALL | values).model


def build(preset: str, **values: Any) -> tuple[GPT, ModelConfig]:
    config = model_config(preset, **values)
    model = GPT(config, 64)
    initialise(model, config, seed=3)
    return model, config


@pytest.mark.parametrize("preset", ["gpt2-tiny", "llama-tiny", "qwen2-tiny"])
@pytest.mark.parametrize("untied", [False, True])
def test_the_loss_is_the_cross_entropy_of_the_logits(preset: str, untied: bool) -> None:
    model, _ = build(preset, untie_embeddings_and_output_weights=untied)
    tokens = torch.randint(0, 64, (3, 13), generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(model.logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert model(tokens).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("preset", ["gpt2-tiny", "llama-tiny", "qwen2-tiny"])
def test_no_position_sees_the_future(preset: str) -> None:
    model, _ = build(preset)
    tokens = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 64
    before, after = model.logits(tokens), model.logits(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_the_order_of_tokens_matters_with_rotary_positions() -> None:
    model, _ = build("llama-tiny")
    a = model.logits(torch.tensor([[1, 2, 3]]))[0, -1]
    b = model.logits(torch.tensor([[2, 1, 3]]))[0, -1]
    assert not torch.allclose(a, b)


def test_biases_where_each_family_has_them() -> None:
    def biases(preset: str) -> set[str]:
        model, _ = build(preset)
        return {
            name.split(".", 2)[2]
            for name, _ in model.named_parameters()
            if "blocks.0" in name and "bias" in name
        }

    assert {"attention.qkv.bias", "attention.output.bias", "mlp.input.bias", "mlp.output.bias"} < biases(
        "gpt2-tiny"
    )
    assert biases("llama-tiny") == set()
    assert biases("qwen2-tiny") == {"attention.qkv.bias"}


def test_initial_weights() -> None:
    model, _ = build("gpt2-tiny", hidden_size=128, num_layers=8)
    block = model.blocks[3]
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attention.output.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert block.mlp.output.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert torch.all(block.mlp.input.bias == 0)
    assert torch.all(model.final_norm.weight == 1)


def test_initial_weights_depend_on_the_name_and_the_seed_only() -> None:
    deep, config = build("llama-tiny", num_layers=3)
    shallow, _ = build("llama-tiny", num_layers=1, init_method_std=0.02)
    assert torch.equal(deep.blocks[0].attention.qkv.weight, shallow.blocks[0].attention.qkv.weight)
    assert not torch.equal(deep.blocks[0].attention.qkv.weight, deep.blocks[1].attention.qkv.weight)
    again = GPT(config, 64)
    initialise(again, config, seed=4)
    assert not torch.equal(deep.blocks[0].attention.qkv.weight, again.blocks[0].attention.qkv.weight)


def test_dropout_only_while_training() -> None:
    model, _ = build("gpt2-tiny", hidden_dropout=0.5, attention_dropout=0.5)
    tokens = torch.arange(12).view(1, 12)
    assert model(tokens).item() != model(tokens).item()
    model.eval()
    assert model(tokens).item() == model(tokens).item()


def test_flops_of_a_known_shape() -> None:
    config = model_config("gpt2-tiny")
    parameters = count_parameters(config, 64)
    positions, attention = 12 * 32, 12 * 2 * 4 * 8 * 12
    assert flops_per_token(config, parameters, 64) == 6 * (parameters - positions) + attention
    untied = model_config("llama-tiny", untie_embeddings_and_output_weights=True)
    parameters = count_parameters(untied, 64)
    assert flops_per_token(untied, parameters, 64) == 6 * (parameters - 64 * 32) + attention


def test_a_small_model_learns_a_sequence() -> None:
    model, _ = build("qwen2-tiny")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(13).view(1, 13) * 3 % 64
    for _ in range(60):
        optimizer.zero_grad()
        model(tokens).backward()
        optimizer.step()
    assert model(tokens).item() < 0.05
