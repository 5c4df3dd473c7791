"""Batches of documents as tokens, by one process or by many, always in the order of the batches."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_adalrs.data.indexed_dataset import best_dtype
from megatron_adalrs.data.tokenizer import Tokenizer, build_tokenizer, tokenizer_paths
from megatron_adalrs.preprocessing.documents import Batch, Position

_BATCHES_AHEAD = 4  # per worker: enough to keep it busy, few enough to bound memory


@dataclass(frozen=True)
class Recipe:
    """How a text becomes tokens; sent to every worker, which builds its tokenizer from it once."""

    tokenizer_type: str
    tokenizer_model: Path | None = None
    json_key: str = "text"
    append_eod: bool = True
    vocab_file: Path | None = None
    merge_file: Path | None = None


@dataclass(frozen=True)
class Encoded:
    """A batch as tokens: all in a row [n], and how many each document has [d]; empty ones are gone."""

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    skipped: int
    end: Position
    input_bytes: int


class Encoder:
    """The recipe at work. Raises ValueError for a bad tokenizer, OSError for one that cannot be read."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokenizer: Tokenizer = build_tokenizer(recipe.tokenizer_type, *tokenizer_paths(recipe))
        self.dtype = best_dtype(self.tokenizer.vocab_size)

    def __call__(self, batch: Batch) -> Encoded:
        """Errors as in `Batch.read`."""
        encode, end = self.tokenizer.encode, [self.tokenizer.eod] if self.recipe.append_eod else []
        documents: list[npt.NDArray[Any]] = []
        skipped = 0
        for text in batch.read(self.recipe.json_key):
            if ids := encode(text):
                # At once, while its numbers are in the processor's cache.
                documents.append(np.fromiter(ids + end, self.dtype))
            else:
                skipped += 1
        tokens = np.concatenate(documents) if documents else np.empty(0, self.dtype)
        lengths = np.array([len(document) for document in documents], "<i4")
        return Encoded(tokens, lengths, skipped, batch.end, batch.input_bytes)


class Encoders:
    """So many workers, as a context manager; one is this process itself.

    Raises ChildProcessError where a worker dies.
    """

    def __init__(self, encoder: Encoder, workers: int) -> None:
        self._encoder = encoder
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Encoders:
        if self._workers > 1:
            # A forked child would inherit the locks of this process' threads in whatever state they are.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, mp_context=context, initializer=_follow_parent)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, batches: Iterable[Batch]) -> Iterator[Encoded]:
        """Encoded batches in the order of `batches`, whichever worker finishes first."""
        if self._pool is None:
            yield from map(self._encoder, batches)
            return
        pending: deque[Future[Encoded]] = deque()
        try:
            for batch in batches:
                pending.append(self._pool.submit(_encode_in_worker, self._encoder.recipe, batch))
                if len(pending) >= self._workers * _BATCHES_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise ChildProcessError("a worker died (killed, or out of memory?): try fewer workers") from error


def _follow_parent() -> None:
    """A worker leaves when its parent does, however that ends. Ctrl-C, which a terminal sends to all of them,
    is the parent's to answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


@cache
def _encoder_in_worker(recipe: Recipe) -> Encoder:
    return Encoder(recipe)


def _encode_in_worker(recipe: Recipe, batch: Batch) -> Encoded:
    return _encoder_in_worker(recipe)(batch)
