"""Named model shapes, `--preset`: the fields of ModelConfig that each one sets.

A preset sets defaults, which YAML keys and flags override. Sources: the models' published config.json files,
except for `seq_length`, the length of training samples.

To add a model family, define its common fields below and add its shapes to `PRESETS`. A layer that the family
needs and `ModelConfig` does not describe is a field there and a module in this package;
`huggingface.tensor_names` describes the conversion of the family's checkpoints.
"""

from __future__ import annotations

from typing import Any

_GPT2 = {
    "vocab_size": 50257,
    "seq_length": 1024,
    "max_position_embeddings": 1024,
}

_LLAMA = {
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "position_embedding_type": "rope",
    "swiglu": True,
    "add_bias_linear": False,
}

_LLAMA3 = _LLAMA | {
    "rotary_base": 500000.0,
    "vocab_size": 128256,
    "num_query_groups": 8,
    "seq_length": 8192,
    "max_position_embeddings": 131072,
    "use_rope_scaling": True,
    "rope_scaling_factor": 8.0,
    "rope_scaling_low_freq_factor": 1.0,
    "rope_scaling_high_freq_factor": 4.0,
    "rope_scaling_original_max_position_embeddings": 8192,
}

_LLAMA32 = _LLAMA3 | {"rope_scaling_factor": 32.0}

_QWEN2 = _LLAMA | {
    "norm_epsilon": 1e-6,
    "rotary_base": 1000000.0,
    "add_qkv_bias": True,
}


def _shape(family: dict[str, Any], layers: int, hidden: int, heads: int, **fields: Any) -> dict[str, Any]:
    return family | {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads} | fields


def _qwen25(
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    ffn: int,
    tied: bool,
    positions: int,
    vocab: int = 151936,
) -> dict[str, Any]:
    return _shape(
        _QWEN2,
        layers,
        hidden,
        heads,
        num_query_groups=groups,
        ffn_hidden_size=ffn,
        vocab_size=vocab,
        seq_length=4096,
        max_position_embeddings=positions,
        untie_embeddings_and_output_weights=not tied,
    )


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-tiny": _shape({}, 4, 128, 4),
    "gpt2": _shape(_GPT2, 12, 768, 12),
    "gpt2-medium": _shape(_GPT2, 24, 1024, 16),
    "gpt2-large": _shape(_GPT2, 36, 1280, 20),
    "gpt2-xl": _shape(_GPT2, 48, 1600, 25),
    "llama-tiny": _shape(_LLAMA, 4, 128, 4, num_query_groups=2),
    "llama3.2-1b": _shape(_LLAMA32, 16, 2048, 32, ffn_hidden_size=8192),
    "llama3.2-3b": _shape(_LLAMA32, 28, 3072, 24, ffn_hidden_size=8192),
    "llama3.1-8b": _shape(
        _LLAMA3, 32, 4096, 32, ffn_hidden_size=14336, untie_embeddings_and_output_weights=True
    ),
    "qwen2-tiny": _shape(_QWEN2, 4, 128, 4, num_query_groups=2),
    "qwen2.5-0.5b": _qwen25(24, 896, 14, 2, 4864, tied=True, positions=32768),
    "qwen2.5-1.5b": _qwen25(28, 1536, 12, 2, 8960, tied=True, positions=131072),
    "qwen2.5-3b": _qwen25(36, 2048, 16, 2, 11008, tied=True, positions=32768),
    "qwen2.5-7b": _qwen25(28, 3584, 28, 4, 18944, tied=False, positions=131072, vocab=152064),
}
