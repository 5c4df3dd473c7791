"""Text in, an indexed dataset out: `PREFIX.bin`, `PREFIX.idx`, and `PREFIX.json` that says how they were
made. Until then its unfinished parts lie in `PREFIX.partial`, from where a later process goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_adalrs.data.description import Description, description_path
from megatron_adalrs.data.indexed_dataset import bin_path, idx_path
from megatron_adalrs.data.tokenizer import TOKENIZER_FILES
from megatron_adalrs.preprocessing.documents import find_files, read_batches
from megatron_adalrs.preprocessing.encoding import Encoder, Encoders, Recipe
from megatron_adalrs.preprocessing.job import describe_job
from megatron_adalrs.preprocessing.partial import Partial, Progress, partial_path

COMMIT_SECONDS = 30.0


@dataclass(frozen=True)
class Result:
    """`skipped`: documents without any text; `seconds`: of wall time until the dataset was there, for
    `new_tokens` of the tokens, the others having been there.
    """

    description: Description
    skipped: int
    new_tokens: int
    seconds: float


def require_new(prefix: Path | str, overwrite: bool) -> None:
    """Raise FileExistsError where a file of a dataset is there already, unless it may be replaced; no folder
    may."""
    outputs = (bin_path(prefix), idx_path(prefix), description_path(prefix))
    if folders := [str(path) for path in outputs if path.is_dir()]:
        raise FileExistsError(f"output {', '.join(folders)} is a folder: required a new prefix")
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
    restart: bool = False,
    commit_seconds: float = COMMIT_SECONDS,
    on_resume: Callable[[Progress], None] = lambda progress: None,
    on_progress: Callable[[int], None] = lambda input_bytes: None,
) -> Result:
    """Tokenize a corpus (see `documents.read_batches`) into an indexed dataset, one document a sequence.

    The result does not depend on `workers`, nor on how often the work was interrupted: every
    `commit_seconds`, and when an exception ends it, what is done is committed to `PREFIX.partial`, and a
    later call with the same job goes on from the last commit (`on_resume` is told where that was); input
    behind it may have changed by then, as where a bad line has been mended. `restart` throws such work away.
    Nothing that was there before under the final names is touched until everything is tokenized.
    `on_progress` is called with the number of input bytes that each finished batch, and at first the earlier
    work, covers.

    Raises FileExistsError if an output exists and `overwrite` is not set; ValueError for broken input
    (FILE:LINE), a corpus without any text, a bad tokenizer, and unfinished work on another job, in use, or
    damaged; OSError for files that cannot be read or written.
    """
    if workers < 1:
        raise ValueError(f"workers {workers}: required at least 1")
    if not commit_seconds >= 0:
        raise ValueError(f"commit_seconds {commit_seconds}: required at least 0")
    started = time.perf_counter()
    source, encoder = Path(source), Encoder(recipe)
    files = _input_files(source, file_glob, partial_path(output_prefix))
    job = describe_job(encoder.tokenizer, recipe, source, files)
    if restart:  # before the work is thrown away
        require_new(output_prefix, overwrite)
    # The work is left first, and so committed, then the workers, for whom that waits.
    with (
        Encoders(encoder, workers) as encoders,
        Partial(output_prefix, encoder.dtype, job, restart=restart) as work,
    ):
        before = work.progress
        if before != Progress():
            on_resume(before)
            on_progress(before.input_bytes)
        if not before.complete:
            require_new(output_prefix, overwrite)
            for encoded in encoders.encode(read_batches(source, files, recipe.json_key, before.position)):
                work.append(encoded)
                work.commit_if_due(commit_seconds)
                on_progress(encoded.input_bytes)
        done = work.progress
        if not done.documents:
            raise ValueError(
                f"input {source}: none of its {done.skipped} documents has any text, at least one is required"
            )
        description = _describe(encoder, done)
        if not done.complete:
            work.complete(description.to_json())
        # Publishing takes an old index away first: one beside the tokens has come since the outputs were
        # looked for.
        if work.has_tokens and idx_path(output_prefix).exists():
            require_new(output_prefix, overwrite)
        work.publish(bin_path(output_prefix), idx_path(output_prefix), description_path(output_prefix))
        seconds = time.perf_counter() - started
    return Result(description, done.skipped, done.tokens - before.tokens, seconds)


def _input_files(source: Path, file_glob: str, unfinished: Path) -> list[Path]:
    """What there is to read, without the unfinished work itself where a folder is read that holds it."""
    found = find_files(source, file_glob)
    return [
        path
        for path in found
        if path.parent.name != unfinished.name or path.parent.resolve() != unfinished.resolve()
    ]


def _describe(encoder: Encoder, done: Progress) -> Description:
    tokenizer = encoder.tokenizer
    return Description(
        tokenizer_type=encoder.recipe.tokenizer_type,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=encoder.recipe.append_eod,
        dtype=encoder.dtype.name,
        documents=done.documents,
        tokens=done.tokens,
        **{
            name: str(path.absolute())
            for name in TOKENIZER_FILES
            if (path := getattr(encoder.recipe, name)) is not None
        },
    )
