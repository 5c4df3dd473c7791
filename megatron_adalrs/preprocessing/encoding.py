"""Encoding of batches of documents into tokens, in one or several processes, in the order of the batches."""

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
    """Tokenizer and settings of the encoding. Every worker builds its tokenizer from it once."""

    tokenizer_type: str
    tokenizer_model: Path | None = None
    json_key: str = "text"
    append_eod: bool = True
    vocab_file: Path | None = None
    merge_file: Path | None = None


@dataclass(frozen=True)
class Encoded:
    """An encoded batch.

    Attributes:
        tokens: Tokens of all documents, concatenated, [n].
        lengths: Number of tokens of each document that is not empty, [d].
        skipped: Number of empty documents.
        end: Position after the batch.
        input_bytes: Bytes of the input that the batch covers.
    """

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    skipped: int
    end: Position
    input_bytes: int


class Encoder:
    """Encodes batches. Raises ValueError if the tokenizer is not valid, OSError if it cannot be read."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokenizer: Tokenizer = build_tokenizer(recipe.tokenizer_type, *tokenizer_paths(recipe))
        self.dtype = best_dtype(self.tokenizer.vocab_size)

    def __call__(self, batch: Batch) -> Encoded:
        """Encode a batch. Raises as `Batch.read` does."""
        encode, end = self.tokenizer.encode, [self.tokenizer.eod] if self.recipe.append_eod else []
        documents: list[npt.NDArray[Any]] = []
        skipped = 0
        for text in batch.read(self.recipe.json_key):
            if ids := encode(text):
                # Convert at once, while the ids are in the cache of the processor.
                documents.append(np.fromiter(ids + end, self.dtype))
            else:
                skipped += 1
        tokens = np.concatenate(documents) if documents else np.empty(0, self.dtype)
        lengths = np.array([len(document) for document in documents], "<i4")
        return Encoded(tokens, lengths, skipped, batch.end, batch.input_bytes)


class Encoders:
    """Context manager of worker processes; a single worker is this process itself.

    Raises:
        ChildProcessError: If a worker dies.
    """

    def __init__(self, encoder: Encoder, workers: int) -> None:
        self._encoder = encoder
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Encoders:
        if self._workers > 1:
            # A forked child would inherit the locks of this process' threads in an arbitrary state.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, mp_context=context, initializer=_follow_parent)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, batches: Iterable[Batch]) -> Iterator[Encoded]:
        """Yield encoded batches in the order of `batches`."""
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
    """Make this worker exit when its parent exits for any reason, and leave Ctrl-C to the parent."""
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
