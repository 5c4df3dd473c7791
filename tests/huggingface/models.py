"""Small random models of transformers."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

_GPT2 = {
    "vocab_size": 257,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 16,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_GATED = {
    "vocab_size": 257,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt2 tied": (GPT2Config, GPT2LMHeadModel, _GPT2),
    "gpt2 untied": (GPT2Config, GPT2LMHeadModel, _GPT2 | {"tie_word_embeddings": False, "n_inner": 40}),
    "llama untied": (LlamaConfig, LlamaForCausalLM, _GATED | {"head_dim": 10, "rms_norm_eps": 1e-5}),
    # Five frequencies: one stays, one is blended, the others are divided. `rope_scaling` is what both
    # versions take.
    "llama scaled": (
        LlamaConfig,
        LlamaForCausalLM,
        _GATED
        | {
            "head_dim": 10,
            "max_position_embeddings": 48,
            "rope_theta": 100.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama tied, biases": (
        LlamaConfig,
        LlamaForCausalLM,
        _GATED
        | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6},
    ),
    "qwen2 untied": (Qwen2Config, Qwen2ForCausalLM, _GATED | {"rope_theta": 1e6, "num_key_value_heads": 1}),
    "qwen2 tied": (Qwen2Config, Qwen2ForCausalLM, _GATED | {"tie_word_embeddings": True, "head_dim": 6}),
}


def made(kind: str, **changes: Any) -> PreTrainedModel:
    """Return a model of a kind with random weights that all affect the output."""
    config, model, values = KINDS[kind]
    torch.manual_seed(0)
    made = (
        model(config(**deepcopy(values) | changes)).float().eval()
    )  # a configuration writes into what it is given
    randomise(made)
    return made


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape), alpha=0.2)


def saved(folder: Path, kind: str, **changes: Any) -> Path:
    made(kind, **changes).save_pretrained(folder)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def contents(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return dtype, shape and bytes of every tensor in a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                part = file.get_slice(name)
                data = file.get_tensor(name).flatten().view(torch.uint8).numpy().tobytes()
                found[name] = part.get_dtype(), part.get_shape(), data
    return found
