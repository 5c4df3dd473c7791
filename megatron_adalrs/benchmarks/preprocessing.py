"""Our preprocessing against a plain loop over the same tokenizer, in one process and in as many as there are
cores.

The sides take turns, block by block; ratios are taken block by block and their median is quoted. They write
the same tokens, which is checked. A machine that others use, or whose cores share what makes them fast, gives
several processes less than one alone: what as many plain loops get that run at the same time, each over a
part of the corpus, and have nothing to do with each other, is measured beside it and is the honest ceiling.
Ratios of processor time tell what the work itself costs; they count the start of processes on both sides.

Starting workers and ending them takes as long for a large corpus as for a small one: it is stated by itself,
and the speed of many workers is taken from when each of them has ended its first batch until the dataset is
there.
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
from megatron_adalrs.preprocessing.preprocess import Recipe, preprocess
from megatron_adalrs.preprocessing.python_sources import collect
from megatron_adalrs.preprocessing.tokenizer_training import train_sentencepiece

PIECES = 2048


@dataclass(frozen=True)
class Spent:
    """`speed`: tokens a second of the wall time that counts; `cpu`: seconds, of all processes; `start`:
    seconds to the first batch; `end`: from when the dataset is there to the return.
    """

    speed: float
    cpu: float
    start: float = 0.0
    end: float = 0.0


def measure_preprocessing(corpus_mb: float, blocks: int, workers: int | None, folder: Path) -> dict[str, Any]:
    """Speed of one worker and of many.

    Args:
        blocks: that count; one more is run first and left out.
        workers: how many; None: one a core.

    Raises:
        ValueError: the corpus is too small for the tokenizer or for so many workers, or these are fewer than
            two.
    """
    workers = workers if workers is not None else max(2, len(os.sched_getaffinity(0)))
    if workers < 2:
        raise ValueError(f"workers {workers}: required at least 2, which are set against one")
    if (batches := corpus_mb * 1e6 // BATCH_BYTES) < 2 * workers:
        raise ValueError(
            f"corpus_mb {corpus_mb:g}: makes {batches:.0f} batches, required two for each of {workers} "
            f"workers"
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
    """Medians over blocks; `plain_loop` and `one_worker` are one process each, the others `workers` at
    once."""
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
    """What one would write: read a line, tokenize it, write the tokens."""
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
    """A loop over each part, all at the same time, each in a new process."""
    cpu = cpu_seconds()
    with ProcessPoolExecutor(len(parts), mp_context=multiprocessing.get_context("spawn")) as strangers:
        done = list(strangers.map(plain_loop, parts, [model] * len(parts)))
    return Spent(sum(one.speed for one in done), cpu_seconds() - cpu)


def our_run(corpus: Path, prefix: Path, recipe: Recipe, workers: int) -> Spent:
    """All of `preprocess`; of many workers the speed (tokens by bytes of input) once each has ended its first
    batch."""
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
    """So many files beside it with its lines in turn."""
    paths = [corpus.with_name(f"part{number}.jsonl") for number in range(parts)]
    lines = corpus.read_bytes().splitlines(keepends=True)
    for number, path in enumerate(paths):
        path.write_bytes(b"".join(lines[number::parts]))
    return paths


def tokens_path(corpus: Path) -> Path:
    return corpus.with_suffix(".tokens")


def cpu_seconds() -> float:
    """Of this process and of all that it has started and that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
