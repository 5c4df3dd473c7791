"""Flags of `megatron-adalrs benchmark`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SHAPE = (
    "preset",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "seq_length",
    "micro_batch_size",
    "bf16",
)


@dataclass(frozen=True)
class Arguments:
    what: Literal[
        "all", "step", "watching", "snapshot", "saving", "parallel", "overhead", "preprocessing", "index"
    ] = "all"
    """What to measure. "all": the first four. "parallel" has a model of its own, one thread a rank, and takes
    about three minutes. "overhead": 12 x pairs steps of two micro-batches, one thread a rank, in each of
    eight meshes."""
    pairs: int = 60
    """Pairs that count; a tenth more are run first and left out. "parallel" and "preprocessing": a fifth as
    many blocks of all sides. "index" has none."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage of the engine. "overhead": all of them."""
    bf16: bool = False
    """bfloat16 in place of fp32 (the hand-written loop then runs under autocast)."""
    preset: Literal["gpt2-tiny", "llama-tiny", "qwen2-tiny"] = "gpt2-tiny"
    """Family of the model; its size is set here."""
    num_layers: int = 6
    hidden_size: int = 256
    num_attention_heads: int = 8
    seq_length: int = 256
    micro_batch_size: int = 8
    threads: int = 2
    """Threads of the process."""
    corpus_mb: float = 12
    """ "preprocessing": size of the text, Python's own sources, in 10^6 bytes."""
    workers: int | None = None
    """ "preprocessing": processes, beside one; default: one a core."""
    tokens: int = 10**9
    """ "index": size of the corpus, whose lengths are random and whose tokens are a hole in a file."""
    documents: int = 10**6
    """ "index": number of its documents."""
