"""GPT and its layers against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.model.models import build


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


def test_rotary_embedding_distinguishes_order() -> None:
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


def test_dropout_only_while_training() -> None:
    model, _ = build("gpt2-tiny", hidden_dropout=0.5, attention_dropout=0.5)
    tokens = torch.arange(12).view(1, 12)
    assert model(tokens).item() != model(tokens).item()
    model.eval()
    assert model(tokens).item() == model(tokens).item()


def test_a_small_model_learns_a_sequence() -> None:
    model, _ = build("qwen2-tiny")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(13).view(1, 13) * 3 % 64
    for _ in range(60):
        optimizer.zero_grad()
        model(tokens).backward()
        optimizer.step()
    assert model(tokens).item() < 0.05
