"""Benchmark of preprocessing against a plain loop with the same tokenizer, in one process and on all cores.

The sides take turns in every block, and a result is the median of the ratios of all blocks. That all sides
write the same tokens is checked. Several processes get less out of a machine than one alone, because they
share caches and clock rates: the upper limit is the speed of as many independent plain loops that run at the
same time, each over a part of the corpus. Ratios of processor time show the cost of the work itself; they
include the start of processes on both sides.

Starting and ending workers takes as long for a large corpus as for a small one, so it is reported separately:
the speed of many workers is measured from the end of each worker's first batch to the complete data set.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_adalrs.preprocessing.documents import BATCH_BYTES
from megatron_adalrs.preprocessing.encoding import Recipe
from megatron_adalrs.preprocessing.preprocess import preprocess
from megatron_adalrs.preprocessing.python_sources import collect
from megatron_adalrs.preprocessing.tokenizer_training import train_sentencepiece

PIECES = 2048


@dataclass(frozen=True)
class Spent:
    """Time of one side in one block."""

    speed: float
    """Tokens per second of wall time."""
    cpu: float
    """Seconds of processor time of all processes."""
    start: float = 0.0
    """Seconds until the first batch."""
    end: float = 0.0
    """Seconds from the complete data set to the return."""


def measure_preprocessing(corpus_mb: float, blocks: int, workers: int | None, folder: Path) -> dict[str, Any]:
    """Measure the speed of one worker and of many.

    Args:
        corpus_mb: Size of the text in 10^6 bytes.
        blocks: Number of measured blocks; one more runs first and does not count.
        workers: Number of workers. Default: one per core, but at least two.
        folder: Folder for all files.

    Raises:
        ValueError: The corpus is too small for the tokenizer or for so many workers, or there are fewer than
            two workers.
    """
    workers = workers if workers is not None else max(2, len(os.sched_getaffinity(0)))
    if workers < 2:
        raise ValueError(f"workers {workers}: at least 2 are required, to compare with one")
    if (batches := corpus_mb * 1e6 // BATCH_BYTES) < 2 * workers:
        raise ValueError(
            f"corpus_mb {corpus_mb:g}: has {batches:.0f} batches; two for each of {workers} workers are "
            "required"
        )
    corpus, model = folder / "code.jsonl", folder / "tokenizer.model"
    documents, _ = collect(Path(sysconfig.get_path("stdlib")), corpus, corpus_mb * 1e6)
    train_sentencepiece([corpus], model, PIECES)
    recipe = Recipe("SentencePieceTokenizer", model)
    parts = split(corpus, workers)
    sides = {
        "plain_loop": lambda: plain_loop(corpus, model),
        "one_worker": lambda: our_run(corpus, folder / "one", recipe, 1),
        "workers": lambda: our_run(corpus, folder / "many", recipe, workers),
        "plain_loops": lambda: plain_loops(parts, model),
    }
    spent: list[dict[str, Spent]] = []
    for block in range(blocks + 1):
        order = list(sides) if block % 2 else list(reversed(sides))
        spent.append({name: sides[name]() for name in order})
    tokens = tokens_path(corpus).read_bytes()
    assert all((folder / f"{name}.bin").read_bytes() == tokens for name in ("one", "many")), (
        "sides differ in tokens"
    )
    about = {
        "bytes": corpus.stat().st_size,
        "documents": documents,
        "tokens": len(tokens) // 2,
        "pieces": PIECES,
    }
    return {"corpus": about, "blocks": blocks, "workers": workers} | compared(spent[1:])


def compared(blocks: list[dict[str, Spent]]) -> dict[str, Any]:
    """Return the medians over blocks."""
    speed = {name: np.array([block[name].speed for block in blocks]) for name in blocks[0]}
    cpu = {name: np.array([block[name].cpu for block in blocks]) for name in blocks[0]}

    def median(values: np.ndarray) -> float:
        return float(np.median(values))

    return {
        "tokens_per_second": {name: median(values) for name, values in speed.items()},
        "one_worker_against_plain_loop": median(speed["one_worker"] / speed["plain_loop"]),
        "one_worker_against_plain_loop_in_cpu_time": median(cpu["plain_loop"] / cpu["one_worker"]),
        "workers_against_one_worker": median(speed["workers"] / speed["one_worker"]),
        "plain_loops_against_plain_loop": median(speed["plain_loops"] / speed["plain_loop"]),
        "workers_against_plain_loops": median(speed["workers"] / speed["plain_loops"]),
        "workers_against_plain_loops_in_cpu_time": median(cpu["plain_loops"] / cpu["workers"]),
        "first_batch_of_workers_after_seconds": median(
            np.array([block["workers"].start for block in blocks])
        ),
        "end_of_workers_seconds": median(np.array([block["workers"].end for block in blocks])),
    }


def plain_loop(corpus: Path, model: Path) -> Spent:
    """Read lines, tokenize them and write the tokens, as a hand-written script would."""
    from sentencepiece import SentencePieceProcessor

    started, cpu = time.perf_counter(), time.process_time()
    tokenizer = SentencePieceProcessor(model_file=str(model))
    tokens = 0
    with corpus.open(encoding="utf-8") as lines, tokens_path(corpus).open("wb") as stream:
        for line in lines:
            ids = tokenizer.encode(json.loads(line)["text"])
            np.array([*ids, tokenizer.eos_id()], dtype=np.uint16).tofile(stream)
            tokens += len(ids) + 1
    return Spent(tokens / (time.perf_counter() - started), time.process_time() - cpu)


def plain_loops(parts: list[Path], model: Path) -> Spent:
    """Run a plain loop over each part at the same time, each in a new process."""
    cpu = cpu_seconds()
    with ProcessPoolExecutor(len(parts), mp_context=multiprocessing.get_context("spawn")) as pool:
        done = list(pool.map(plain_loop, parts, [model] * len(parts)))
    return Spent(sum(one.speed for one in done), cpu_seconds() - cpu)


def our_run(corpus: Path, prefix: Path, recipe: Recipe, workers: int) -> Spent:
    """Run `preprocess`. The speed of several workers is measured once each has finished its first batch."""
    started, cpu = time.perf_counter(), cpu_seconds()
    batches: list[tuple[float, int]] = []
    result = preprocess(
        corpus,
        prefix,
        recipe,
        workers=workers,
        overwrite=True,
        on_progress=lambda size: batches.append((time.perf_counter(), size)),
    )
    returned, ended = time.perf_counter(), started + result.seconds
    begun, left = (started, batches) if workers == 1 else (batches[workers - 1][0], batches[workers:])
    share = sum(size for _, size in left) / sum(size for _, size in batches)
    speed = share * result.description.tokens / (ended - begun)
    return Spent(speed, cpu_seconds() - cpu, batches[0][0] - started, returned - ended)


def split(corpus: Path, parts: int) -> list[Path]:
    """Distribute the lines of a corpus over files beside it and return their paths."""
    paths = [corpus.with_name(f"part{number}.jsonl") for number in range(parts)]
    lines = corpus.read_bytes().splitlines(keepends=True)
    for number, path in enumerate(paths):
        path.write_bytes(b"".join(lines[number::parts]))
    return paths


def tokens_path(corpus: Path) -> Path:
    """Return the path of the tokens that a plain loop writes."""
    return corpus.with_suffix(".tokens")


def cpu_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
