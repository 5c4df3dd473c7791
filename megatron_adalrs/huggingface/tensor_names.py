"""Names and layouts of the tensors of Hugging Face models that make up each of our parameters.

Only import and export need this; `model/presets.py` says how to add a model family.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Family:
    """A model architecture of transformers.

    Its tensors, concatenated along the first dimension, make up one of our parameters: q, k and v in this
    order, gate and up in this order.
    """

    model_type: str
    """`model_type` in config.json."""
    architecture: str
    """The only supported entry of `architectures`: the language model with its output matrix."""
    prefix: str
    """Prefix of all names but that of the output matrix. Some published files lack it."""
    outer: dict[str, str]
    """Name, after the prefix, of each of our modules outside the blocks."""
    blocks: str
    """Name of the list of blocks, after the prefix."""
    inner: dict[str, tuple[str, ...]]
    """Modules that make up each of our modules within a block."""
    transposed: frozenset[str] = frozenset()
    """Our modules whose matrices are stored as [in, out]."""
    buffers: re.Pattern[str] = re.compile(r".*\.rotary_emb\.inv_freq")
    """Tensors in files of older versions of transformers that are not weights."""

    def tensors_of(self, parameter: str) -> tuple[tuple[str, ...], bool]:
        """Return the names of the tensors of one of our parameters, and whether they are transposed."""
        if parameter == "output.weight":
            return ("lm_head.weight",), False
        found = _BLOCK.fullmatch(parameter)
        if found is None:
            module, _, kind = parameter.rpartition(".")
            return (f"{self.prefix}{self.outer[module]}.{kind}",), False
        number, module, kind = found.groups()
        names = tuple(f"{self.prefix}{self.blocks}.{number}.{theirs}.{kind}" for theirs in self.inner[module])
        return names, kind == "weight" and module in self.transposed


_GATED: dict[str, Any] = {
    "prefix": "model.",
    "outer": {"embedding.tokens": "embed_tokens", "final_norm": "norm"},
    "blocks": "layers",
    "inner": {
        "attention_norm": ("input_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.output": ("self_attn.o_proj",),
        "mlp_norm": ("post_attention_layernorm",),
        "mlp.input": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.output": ("mlp.down_proj",),
    },
}

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    outer={"embedding.tokens": "wte", "embedding.positions": "wpe", "final_norm": "ln_f"},
    blocks="h",
    inner={
        "attention_norm": ("ln_1",),
        "attention.qkv": ("attn.c_attn",),
        "attention.output": ("attn.c_proj",),
        "mlp_norm": ("ln_2",),
        "mlp.input": ("mlp.c_fc",),
        "mlp.output": ("mlp.c_proj",),
    },
    transposed=frozenset({"attention.qkv", "attention.output", "mlp.input", "mlp.output"}),
    buffers=re.compile(r".*\.attn\.(bias|masked_bias)"),
)
LLAMA = Family(model_type="llama", architecture="LlamaForCausalLM", **_GATED)
QWEN2 = Family(model_type="qwen2", architecture="Qwen2ForCausalLM", **_GATED)

FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, QWEN2)}
