"""Names and layouts: which tensors of a Hugging Face model make one parameter of ours."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Family:
    """A kind of model in transformers.

    Its tensors, one below the other, make one parameter of ours: q, k and v in this order, gate and up in
        this order.
    """

    model_type: str
    """In config.json."""
    architecture: str
    """The only one that is read: the language model, with its output matrix."""
    prefix: str
    """Of every name but the output matrix's; files written by old versions lack it."""
    outer: dict[str, str]
    """Their name, after the prefix, of each module of ours outside the blocks."""
    blocks: str
    """Their name of the list of blocks, after the prefix."""
    inner: dict[str, tuple[str, ...]]
    """Their modules for each of ours within a block."""
    transposed: frozenset[str] = frozenset()
    """Modules of ours whose matrices they keep as [in, out]."""
    buffers: re.Pattern[str] = re.compile(r".*\.rotary_emb\.inv_freq")
    """Tensors in files of old versions that hold no weights."""

    def tensors_of(self, parameter: str) -> tuple[tuple[str, ...], bool]:
        """Names of the tensors that make a parameter of this name, and whether each is transposed."""
        if parameter == "output.weight":
            return ("lm_head.weight",), False
        found = _BLOCK.fullmatch(parameter)
        if found is None:
            module, _, kind = parameter.rpartition(".")
            return (f"{self.prefix}{self.outer[module]}.{kind}",), False
        number, module, kind = found.groups()
        names = tuple(f"{self.prefix}{self.blocks}.{number}.{theirs}.{kind}" for theirs in self.inner[module])
        return names, kind == "weight" and module in self.transposed


_GATED = {
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
LLAMA = Family(model_type="llama", architecture="LlamaForCausalLM", **_GATED)  # type: ignore[arg-type]
QWEN2 = Family(model_type="qwen2", architecture="Qwen2ForCausalLM", **_GATED)  # type: ignore[arg-type]

FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, QWEN2)}
