"""Conversion between config.json and the fields of a ModelConfig.

Every field that changes what a model computes is read, or refused if our model does not support its value.
Dropout is not read, since every run sets its own. This module does not import torch, because the command line
takes defaults from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.config.base import require, shown_division
from megatron_adalrs.huggingface.rope_config import is_positive_number, rotary_fields, rotary_json
from megatron_adalrs.huggingface.tensor_names import FAMILIES, GPT2, LLAMA, QWEN2, Family
from megatron_adalrs.utils.text_files import read_text

CONFIG = "config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
"""Names of the tanh approximation; "gelu" is the exact function."""
_SILU = ("silu", "swish")


def is_model(folder: Path) -> bool:
    """Return whether a folder is a Hugging Face model, that is, has a config.json."""
    return (folder / CONFIG).is_file()


class Shape:
    """Configuration of a model, read from the config.json in a folder.

    Raises:
        ValueError: The file cannot be read, or our model does not support a value; the message names file,
            field and value.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / CONFIG
        try:
            content = json.loads(read_text(path))
            require(isinstance(content, dict), "it must hold fields by name")
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot read {path}: {str(error) or type(error).__name__}") from None
        self._path, self._content = path, content
        self.family = self._family()
        self.vocab_size: int = self._size("vocab_size")
        self.tied: bool = self._flag("tie_word_embeddings", default=self.family is GPT2)
        self.max_positions: int = self._size(
            "n_positions" if self.family is GPT2 else "max_position_embeddings"
        )
        self.fields: dict[str, Any] = self._gpt2() if self.family is GPT2 else self._gated()
        """Fields of a ModelConfig as plain values, without `seq_length`."""

    @property
    def token_ids(self) -> dict[str, Any]:
        """Ids of the special tokens in config.json."""
        return {name: self._content.get(name) for name in TOKEN_IDS}

    def _family(self) -> Family:
        kind, architectures = self._content.get("model_type"), self._content.get("architectures")
        if kind not in FAMILIES:
            raise self._refused("model_type", kind, f"required one of {', '.join(FAMILIES)}")
        family = FAMILIES[kind]
        if architectures not in (None, [], [family.architecture]):
            raise self._refused("architectures", architectures, f"required [{family.architecture!r}]")
        self._only("quantization_config", None)
        return family

    def _gpt2(self) -> dict[str, Any]:
        self._only("activation_function", *_GELU, default="gelu_new")
        self._only("scale_attn_weights", True, default=True)
        for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            self._only(name, False, default=False)
        hidden, heads = self._size("n_embd"), self._size("n_head")
        self._divides("n_embd", hidden, "n_head", heads)
        return {
            "num_layers": self._size("n_layer"),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "ffn_hidden_size": self._size("n_inner", default=4 * hidden),
            "normalization": "LayerNorm",
            "norm_epsilon": self._number("layer_norm_epsilon", default=1e-5),
            "position_embedding_type": "learned_absolute",
            "swiglu": False,
            "add_bias_linear": True,
            **self._common(),
        }

    def _gated(self) -> dict[str, Any]:
        self._only("hidden_act", *_SILU, default="silu")
        self._only("use_sliding_window", False, default=False)
        kinds = self._content.get("layer_types") or []
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise self._refused("layer_types", kinds, "required full_attention in every layer")
        is_llama = self.family is LLAMA
        biases = self._flag("attention_bias", default=False) if is_llama else False
        if is_llama and self._flag("mlp_bias", default=False) != biases:
            raise self._refused("mlp_bias", not biases, f"required attention_bias, which is {biases}")
        hidden, heads = self._size("hidden_size"), self._size("num_attention_heads")
        head_dim = self._size("head_dim", default=0)
        if not head_dim:
            self._divides("hidden_size", hidden, "num_attention_heads", heads)
        groups = self._size("num_key_value_heads", default=heads)
        self._divides("num_attention_heads", heads, "num_key_value_heads", groups)
        return {
            "num_layers": self._size("num_hidden_layers"),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_query_groups": groups,
            "kv_channels": head_dim or hidden // heads,
            "ffn_hidden_size": self._size("intermediate_size"),
            "normalization": "RMSNorm",
            "norm_epsilon": self._number("rms_norm_eps", default=1e-6),
            "position_embedding_type": "rope",
            **rotary_fields(self._content, self._refused),
            "swiglu": True,
            "add_bias_linear": biases,
            "add_qkv_bias": biases or not is_llama,
            **self._common(),
        }

    def _common(self) -> dict[str, Any]:
        return {
            "untie_embeddings_and_output_weights": not self.tied,
            "init_method_std": self._number("initializer_range", default=0.02),
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
        }

    # Reading one field

    def _size(self, name: str, default: int | None = None) -> int:
        value = self._content.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 1:
            raise self._refused(name, value, "must be a whole number above 0")
        return value

    def _number(self, name: str, default: float) -> float:
        value = self._content.get(name, default)
        if not is_positive_number(value):
            raise self._refused(name, value, "must be a number above 0")
        return float(value)

    def _flag(self, name: str, default: bool) -> bool:
        value = self._content.get(name, default)
        if type(value) is not bool:
            raise self._refused(name, value, "must be true or false")
        return value

    def _only(self, name: str, *allowed: Any, default: Any = None) -> None:
        value = self._content.get(name, default)
        if value not in allowed:
            known = " or ".join(json.dumps(one) for one in allowed if one is not None) or "none"
            raise self._refused(name, value, f"not supported, required {known}")

    def _divides(self, name: str, size: int, by_name: str, by: int) -> None:
        if size % by:
            raise self._refused(name, size, f"is not divisible by {by_name}: {shown_division(size, by)}")

    def _refused(self, name: str, value: Any, requirement: str) -> ValueError:
        return ValueError(f"{self._path}: {name}: {value!r:.200}: {requirement}")


def family_of(model: ModelConfig) -> Family:
    """Return the family that a model belongs to.

    Raises:
        ValueError: The model fits no family; the message names the field.
    """
    if model.position_embedding_type == "learned_absolute":
        family = GPT2
        needed = {
            "normalization": "LayerNorm",
            "swiglu": False,
            "add_bias_linear": True,
            "has_qkv_bias": True,
            "num_key_value_heads": model.num_attention_heads,
            "head_dim": model.hidden_size // model.num_attention_heads,
        }
    else:
        family = QWEN2 if model.has_qkv_bias and not model.add_bias_linear else LLAMA
        needed = {
            "normalization": "RMSNorm",
            "swiglu": True,
            "has_qkv_bias": model.add_bias_linear or family is QWEN2,
        }
    for name, value in needed.items():
        if getattr(model, name) != value:
            raise ValueError(
                f"{_FIELDS.get(name, name)}: {getattr(model, name)!r}: {family.model_type}, the nearest "
                f"family, has {value!r}"
            )
    if model.hidden_size % model.num_attention_heads:
        division = shown_division(model.hidden_size, model.num_attention_heads)
        raise ValueError(
            f"hidden_size: {model.hidden_size}: {family.model_type} divides it into heads: {division}"
        )
    return family


_FIELDS = {
    "has_qkv_bias": "add_qkv_bias",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
}


def config_json(
    family: Family, model: ModelConfig, vocab_size: int, dtype: str, token_ids: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of config.json for versions 4 and 5 of transformers.

    Args:
        dtype: Name of the torch dtype, such as "bfloat16".
        token_ids: bos_token_id, eos_token_id and pad_token_id, as far as they are known.
    """
    common = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "initializer_range": model.init_method_std,
        "torch_dtype": dtype,
        "use_cache": True,
        # Unknown ids are written as null, because transformers has defaults of its own.
        **{name: token_ids.get(name) for name in TOKEN_IDS},
    }
    if family is GPT2:
        return common | {
            "n_embd": model.hidden_size,
            "n_layer": model.num_layers,
            "n_head": model.num_attention_heads,
            "n_inner": model.mlp_size,
            "n_positions": model.max_positions,
            "layer_norm_epsilon": model.norm_epsilon,
            "activation_function": "gelu_new",
            "attn_pdrop": model.attention_dropout,
            "embd_pdrop": model.hidden_dropout,
            "resid_pdrop": model.hidden_dropout,
        }
    biases = (
        {"attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear}
        if family is LLAMA
        else {}
    )
    return (
        common
        | biases
        | {
            "hidden_size": model.hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_key_value_heads,
            "head_dim": model.head_dim,
            "intermediate_size": model.mlp_size,
            "max_position_embeddings": model.max_positions,
            "rms_norm_eps": model.norm_epsilon,
            "hidden_act": "silu",
            **rotary_json(model),
            "attention_dropout": model.attention_dropout,
        }
    )
