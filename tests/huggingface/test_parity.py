"""Logits and gradients equal those of transformers after import and export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.config.model import RopeScaling
from megatron_adalrs.huggingface.config_json import family_of
from megatron_adalrs.huggingface.reader import HuggingFaceModel, parameter_shapes
from megatron_adalrs.huggingface.writer import ConvertedTensors, write_model
from megatron_adalrs.model.gpt import GPT
from megatron_adalrs.model.initialization import write_weights
from megatron_adalrs.model.rotary_embedding import Rotary
from tests.huggingface.models import KINDS, made, randomise, saved

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def assert_same(theirs: PreTrainedModel, ours: GPT, config: ModelConfig, vocab_size: int) -> None:
    shape = 3, config.max_positions + 1
    tokens = torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(1))
    logits = theirs(tokens[:, :-1]).logits
    assert logits.std() > 0.5, "nothing would be seen"
    torch.testing.assert_close(ours.logits(tokens[:, :-1]), logits, **CLOSE)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    found = ours(tokens)
    torch.testing.assert_close(found, loss, **CLOSE)
    loss.backward()
    found.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    there = dict(
        ConvertedTensors(family_of(config), config, vocab_size, lambda n, s: gradients[n][: s[0]]).items()
    )
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert there.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(there[name], gradient, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_import_computes_the_same_function(tmp_path: Path, kind: str) -> None:
    theirs = made(kind)
    theirs.save_pretrained(tmp_path)
    found = HuggingFaceModel(tmp_path)
    assert (found.vocab_size, found.family.model_type) == (257, kind.split()[0])
    ours = GPT(found.model, found.vocab_size)
    write_weights(ours, found)
    assert_same(theirs, ours, found.model, found.vocab_size)


@pytest.mark.parametrize("kind", KINDS)
def test_export_computes_the_same_function(tmp_path: Path, kind: str) -> None:
    config = HuggingFaceModel(saved(tmp_path / "shape", kind)).model
    ours = GPT(config, 257)
    randomise(ours)
    weights: dict[str, Tensor] = {name: parameter.detach() for name, parameter in ours.named_parameters()}
    write_model(
        tmp_path / "theirs",
        config,
        257,
        lambda name, shape: weights[name][: shape[0]],
        lambda name: torch.float32,
        {"eos_token_id": 256},
        {},
        max_shard_size=9000,
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert theirs.dtype == torch.float32
    assert (theirs.config.eos_token_id, theirs.generation_config.eos_token_id) == (256, 256)
    assert (theirs.config.bos_token_id, theirs.generation_config.bos_token_id) == (None, None)
    assert len(list((tmp_path / "theirs").glob("model-*-of-*.safetensors"))) > 2
    assert_same(theirs, ours, config, 257)


def test_rope_scaling_changes_the_output(tmp_path: Path) -> None:
    """The scaling has an effect, so that the parity tests of "llama scaled" cover it."""
    found = HuggingFaceModel(saved(tmp_path, "llama scaled"))
    assert found.model.rope_scaling == RopeScaling(4.0, 1.0, 4.0, 32)
    unscaled = found.model.model_copy(update={"use_rope_scaling": False})
    scaled, unscaled = (GPT(model, 257) for model in (found.model, unscaled))
    for model in (scaled, unscaled):
        write_weights(model, found)
    tokens = torch.arange(48)[None]
    assert (scaled.logits(tokens) - unscaled.logits(tokens)).std() > 0.1


@pytest.mark.parametrize("factor", [None, 8.0, 32.0])
def test_distant_positions_have_the_same_angles(factor: float | None) -> None:
    scaling = factor and RopeScaling(factor, 1.0, 4.0, 8192)
    told = {"rope_scaling": {"rope_type": "llama3"} | asdict(scaling)} if scaling else {}
    config = LlamaConfig(head_dim=128, max_position_embeddings=131072, rope_theta=5e5, **told)
    places = torch.arange(0, 131072, 127)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), places[None])
    ours = Rotary(128, 131072, 5e5, scaling)
    torch.testing.assert_close(ours.cos[places], cos[0], **CLOSE)
    torch.testing.assert_close(ours.signed_sin[places].abs(), sin[0].abs(), **CLOSE)


def test_published_gpt2_names_and_buffers_are_read(tmp_path: Path) -> None:
    """openai-community/gpt2 has no prefix and contains the causal mask."""
    folder = saved(tmp_path / "theirs", "gpt2 tied")
    expected = HuggingFaceModel(folder)
    old = {
        name.removeprefix("transformer."): one
        for name, one in load_file(folder / "model.safetensors").items()
    }
    save_file(old | {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril()}, folder / "model.safetensors")
    found = HuggingFaceModel(folder)
    for name, shape in parameter_shapes(found.model, 257).items():
        assert torch.equal(found(name, shape), expected(name, shape))
