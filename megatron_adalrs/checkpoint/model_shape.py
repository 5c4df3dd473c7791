"""The fields that two models must share to have the same parameters and computation."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.config.model import RopeScaling


def shape_of(model: ModelConfig) -> dict[str, Any]:
    """Return these fields with their effective values; None where a field has no effect on the model."""
    is_learned = model.position_embedding_type == "learned_absolute"
    plain = (
        "hidden_size",
        "num_layers",
        "num_attention_heads",
        "swiglu",
        "normalization",
        "norm_epsilon",
        "position_embedding_type",
        "use_rope_scaling",
        "add_bias_linear",
        "untie_embeddings_and_output_weights",
    )
    return {
        **{name: getattr(model, name) for name in plain},
        "num_query_groups": model.num_key_value_heads,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.mlp_size,
        "max_position_embeddings": model.max_positions if is_learned else None,
        "rotary_base": None if is_learned else model.rotary_base,
        **{
            f"rope_scaling_{field.name}": getattr(model.rope_scaling, field.name, None)
            for field in fields(RopeScaling)
        },
        "add_qkv_bias": model.has_qkv_bias,
    }
