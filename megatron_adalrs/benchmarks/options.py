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
    """Benchmark to run. "all" stands for step, watching, snapshot and saving. "parallel" has a fixed model
    and takes about three minutes. "overhead" takes 12 * pairs steps of two micro-batches with each of eight
    combinations of ranks and ZeRO stage. In both, every rank has one thread."""
    pairs: int = 60
    """Number of measured pairs; a tenth more run first as a warm-up. "parallel" and "preprocessing" have
    a fifth as many blocks in which all sides run. Without effect on "index"."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage of the engine. Without effect on "overhead", which measures all."""
    bf16: bool = False
    """Use bfloat16 instead of fp32. The hand-written loop then uses autocast."""
    preset: Literal["gpt2-tiny", "llama-tiny", "qwen2-tiny"] = "gpt2-tiny"
    """Family of the model. The other flags set its size."""
    num_layers: int = 6
    """Number of layers."""
    hidden_size: int = 256
    """Width of the model."""
    num_attention_heads: int = 8
    """Number of attention heads."""
    seq_length: int = 256
    """Tokens in a sample."""
    micro_batch_size: int = 8
    """Samples in a micro-batch."""
    threads: int = 2
    """Number of threads of the process."""
    corpus_mb: float = 12
    """Preprocessing: size of the text, which is Python's standard library, in 10^6 bytes."""
    workers: int | None = None
    """Preprocessing: number of worker processes to compare with one. Default: one per core."""
    tokens: int = 10**9
    """Index: number of tokens of the data set. Document lengths are random; the tokens are not written."""
    documents: int = 10**6
    """Index: number of documents of the data set."""
