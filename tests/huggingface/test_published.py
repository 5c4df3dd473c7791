"""Published config.json files equal our presets and have the published numbers of parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.config import ModelConfig
from megatron_adalrs.huggingface.config_json import Shape
from megatron_adalrs.model.gpt import count_parameters
from tests.model.test_presets import PUBLISHED as PARAMETERS

_GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_type": "cls_index",
    "vocab_size": 50257,
}
_QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
}
_LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}


def _scaled_by(factor: float) -> dict[str, Any]:
    return {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2 | {"n_embd": 768, "n_head": 12, "n_layer": 12},
    "gpt2-medium": _GPT2 | {"n_embd": 1024, "n_head": 16, "n_layer": 24},
    "gpt2-large": _GPT2 | {"n_embd": 1280, "n_head": 20, "n_layer": 36},
    "gpt2-xl": _GPT2 | {"n_embd": 1600, "n_head": 25, "n_layer": 48},
    "qwen2.5-0.5b": _QWEN25
    | {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "qwen2.5-1.5b": _QWEN25
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "sliding_window": 131072,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "qwen2.5-3b": _QWEN25
    | {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "max_position_embeddings": 32768,
        "max_window_layers": 36,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "qwen2.5-7b": _QWEN25
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
    "llama3.2-1b": _LLAMA3
    | {
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "rope_scaling": _scaled_by(32.0),
        "tie_word_embeddings": True,
    },
    "llama3.2-3b": _LLAMA3
    | {
        "head_dim": 128,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_hidden_layers": 28,
        "rope_scaling": _scaled_by(32.0),
        "tie_word_embeddings": True,
    },
    "llama3.1-8b": _LLAMA3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rope_scaling": _scaled_by(8.0),
        "tie_word_embeddings": False,
    },
}
NEEDED = {"seq_length": 1024, "train_iters": 1, "lr": 1.0, "data_path": "d"}
IMPLIED = {
    "kv_channels": "head_dim",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "mlp_size",
    "add_qkv_bias": "has_qkv_bias",
}
"""Fields that a preset may leave to their defaults, and what tells the value."""


@pytest.fixture
def folder(preset: str, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[preset]))
    return tmp_path


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_published_configuration_is_our_preset(folder: Path, preset: str) -> None:
    mine = config_from_values(NEEDED | {"preset": preset}).model
    theirs = config_from_values(NEEDED | {"finetune_from": str(folder)}).model
    for name in ModelConfig.model_fields.keys() - {"preset"}:
        shown = IMPLIED.get(name, name)
        assert getattr(theirs, shown) == getattr(mine, shown), name


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_config_has_published_parameters(folder: Path, preset: str) -> None:
    model = ModelConfig(**Shape(folder).fields | {"seq_length": 1024, "make_vocab_size_divisible_by": 1})
    assert count_parameters(model, model.vocab_size) == PARAMETERS[preset]


def test_every_preset_has_a_published_config() -> None:
    assert PUBLISHED.keys() == PARAMETERS.keys()
