"""Text in, an indexed dataset out: `PREFIX.bin`, `PREFIX.idx`, and `PREFIX.json` that says how they were
made.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_adalrs.data.atomic import atomic_write
from megatron_adalrs.data.documents import Batch, read_batches
from megatron_adalrs.data.indexed_dataset import IndexedDatasetBuilder, best_dtype, bin_path, idx_path
from megatron_adalrs.data.tokenizer import Tokenizer, build_tokenizer

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
class Description:
    """What `PREFIX.json` says of the pair beside it."""

    tokenizer_type: str
    tokenizer_sha256: str
    vocab_size: int
    eod: int
    append_eod: bool
    dtype: str
    documents: int
    tokens: int


@dataclass(frozen=True)
class Result:
    """`skipped`: documents without any text; `seconds`: of wall time."""

    description: Description
    skipped: int
    seconds: float


@dataclass(frozen=True)
class _Encoded:
    """A batch as tokens: all in a row [n], and how many each document has; empty ones are gone."""

    tokens: npt.NDArray
    lengths: list[int]
    skipped: int
    input_bytes: int


class _Encoder:
    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        files = recipe.tokenizer_model, recipe.vocab_file, recipe.merge_file
        self.tokenizer: Tokenizer = build_tokenizer(recipe.tokenizer_type, *files)
        self.dtype = best_dtype(self.tokenizer.vocab_size)

    def __call__(self, batch: Batch) -> _Encoded:
        end = [self.tokenizer.eod] if self.recipe.append_eod else []
        documents: list[npt.NDArray] = []
        skipped = 0
        for text in batch.read(self.recipe.json_key):
            ids = self.tokenizer.encode(text)
            if ids:
                documents.append(np.array(ids + end, dtype=self.dtype))
            else:
                skipped += 1
        tokens = np.concatenate(documents) if documents else np.zeros(0, self.dtype)
        return _Encoded(tokens, [len(document) for document in documents], skipped, batch.input_bytes)


@cache
def _encoder_in_worker(recipe: Recipe) -> _Encoder:
    return _Encoder(recipe)


def _encode_in_worker(recipe: Recipe, batch: Batch) -> _Encoded:
    return _encoder_in_worker(recipe)(batch)


def description_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.json")


def read_description(prefix: Path | str) -> Description | None:
    """What is known of a pair's making; None without a sidecar (data that came from elsewhere).

    Raises ValueError if the sidecar is there but is not one of ours.
    """
    path = description_path(prefix)
    if not path.is_file():
        return None
    try:
        return Description(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not describe an indexed dataset: {error}") from error


def write_description(prefix: Path | str, description: Description) -> None:
    """The sidecar that `read_description` reads. Raises OSError where it cannot be written."""
    with atomic_write(description_path(prefix)) as stream:
        stream.write(json.dumps(asdict(description), indent=2).encode() + b"\n")


def require_new(prefix: Path | str, overwrite: bool) -> None:
    """Raise FileExistsError where a file of a dataset is there already, unless it may be replaced."""
    outputs = (bin_path(prefix), idx_path(prefix), description_path(prefix))
    if not overwrite and (existing := [str(path) for path in outputs if path.exists()]):
        raise FileExistsError(f"output {', '.join(existing)} exists: required a new prefix, or --overwrite")


def preprocess(
    source: Path | str,
    output_prefix: Path | str,
    recipe: Recipe,
    *,
    file_glob: str = "**/*.txt",
    workers: int = 1,
    overwrite: bool = False,
    on_progress: Callable[[int], None] = lambda input_bytes: None,
) -> Result:
    """Tokenize a corpus (see `documents.read_batches`) into an indexed dataset, one document a sequence.

    The result does not depend on `workers`. Nothing that was there before is touched until everything is
    tokenized. `on_progress` is called with the number of input bytes that each finished batch covers.

    Raises FileExistsError if an output exists and `overwrite` is not set; ValueError for broken input
    (FILE:LINE), a corpus without any text, or a bad tokenizer; OSError for files that cannot be read or
    written.
    """
    if workers < 1:
        raise ValueError(f"workers {workers}: required at least 1")
    require_new(output_prefix, overwrite)
    started = time.perf_counter()
    encoder = _Encoder(recipe)
    batches = read_batches(Path(source), file_glob)
    skipped = tokens = 0
    Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetBuilder(output_prefix, encoder.dtype) as builder:
        for encoded in _encode_all(encoder, batches, workers):
            for document in np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1]) if encoded.lengths else ():
                builder.add_document(document)
            skipped += encoded.skipped
            tokens += len(encoded.tokens)
            on_progress(encoded.input_bytes)
        if builder.num_documents == 0:
            raise ValueError(f"input {source}: none of its {skipped} documents has any text, at least one is required")
        description_path(output_prefix).unlink(missing_ok=True)
        builder.finalize()
        documents = builder.num_documents
    tokenizer = encoder.tokenizer
    description = Description(
        tokenizer_type=recipe.tokenizer_type,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=recipe.append_eod,
        dtype=encoder.dtype.name,
        documents=documents,
        tokens=tokens,
    )
    write_description(output_prefix, description)
    return Result(description, skipped, time.perf_counter() - started)


def _encode_all(encoder: _Encoder, batches: Iterable[Batch], workers: int) -> Iterator[_Encoded]:
    """Encoded batches in the order of `batches`, whichever worker finishes first."""
    if workers == 1:
        yield from map(encoder, batches)
        return
    # A forked child would inherit the locks of this process' threads in whatever state they are.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    pending: deque[Future[_Encoded]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, encoder.recipe, batch))
            if len(pending) >= workers * _BATCHES_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError("a worker died (killed, or out of memory?): try fewer workers") from error
    finally:
        pool.shutdown(cancel_futures=True)
