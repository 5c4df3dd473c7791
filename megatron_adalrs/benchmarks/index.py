"""Benchmark of a large data set: time and memory to write and open its .idx, and to build and open its order.

The documents have random lengths; the tokens are a hole in a sparse file, because nothing here reads them.
Every step runs in a process of its own, whose start does not count; the memory of a step is the growth of its
peak. The files have just been written, so that opening them reads memory rather than a disk.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from megatron_adalrs.data.gpt_dataset import GPTDataset
from megatron_adalrs.data.indexed_dataset import IndexedDataset
from megatron_adalrs.data.indexed_dataset_builder import write_index
from megatron_adalrs.data.pair_files import bin_path, idx_path

SEQ_LENGTH = 2048


def measure_index(tokens: int, documents: int, folder: Path) -> dict[str, Any]:
    """Measure seconds and bytes of memory of each step.

    Raises:
        ValueError: There are fewer tokens than documents, or too few for a sample.
    """
    if not 0 < documents <= tokens:
        raise ValueError(f"documents {documents}: required 1 to tokens({tokens})")
    steps: dict[str, tuple[Callable[..., float], tuple[Any, ...]]] = {
        "write_idx": (write_corpus, (folder / "corpus", tokens, documents)),
        "open_idx": (open_corpus, (folder / "corpus",)),
        "build": (open_order, (folder / "corpus", folder / "cache")),
        "open_cached": (open_order, (folder / "corpus", folder / "cache")),
    }
    results: dict[str, Any] = {"tokens": tokens, "documents": documents, "seq_length": SEQ_LENGTH}
    for name, (step, arguments) in steps.items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            results[name] = process.submit(measured, step, *arguments).result()
    return results


def measured(step: Callable[..., float], *arguments: Any) -> dict[str, float]:
    """Call a step, which returns its seconds, and return these with the growth of the peak memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = step(*arguments)
    return {
        "seconds": seconds,
        "memory_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
    }


def write_corpus(prefix: Path, tokens: int, documents: int) -> float:
    """Write a data set of documents with random lengths and return the seconds for its index."""
    shares = np.random.default_rng(0).lognormal(size=documents)
    ends = np.floor(np.cumsum(shares) / shares.sum() * (tokens - documents)).astype(np.int64)
    ends[-1] = tokens - documents
    lengths = (1 + np.diff(ends, prepend=0)).astype(np.int32)
    with bin_path(prefix).open("wb") as stream:
        stream.truncate(2 * tokens)
    started = time.perf_counter()
    write_index(idx_path(prefix), np.dtype("<u2"), lengths, np.arange(documents + 1))
    return time.perf_counter() - started


def open_corpus(prefix: Path) -> float:
    """Open a data set and return the seconds."""
    started = time.perf_counter()
    IndexedDataset(prefix)
    return time.perf_counter() - started


def open_order(prefix: Path, cache: Path) -> float:
    """Build one epoch of samples, or open it in the cache, and return the seconds including the .idx."""
    started = time.perf_counter()
    dataset = IndexedDataset(prefix)
    samples = (dataset.num_tokens - 1) // SEQ_LENGTH
    everything = range(dataset.num_documents)
    GPTDataset(
        dataset,
        everything,
        split="train",
        seq_length=SEQ_LENGTH,
        num_samples=samples,
        seed=0,
        cache_dir=cache,
    )
    return time.perf_counter() - started
