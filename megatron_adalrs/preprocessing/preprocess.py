"""Preprocessing of a corpus into an indexed dataset.

The dataset consists of `PREFIX.bin`, `PREFIX.idx` and its description `PREFIX.json`. Unfinished work is in
`PREFIX.partial`, from which a later process resumes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_adalrs.data.description import Description, description_path
from megatron_adalrs.data.pair_files import bin_path, idx_path
from megatron_adalrs.data.tokenizer import TOKENIZER_FILES
from megatron_adalrs.preprocessing.documents import find_files, read_batches
from megatron_adalrs.preprocessing.encoding import Encoder, Encoders, Recipe
from megatron_adalrs.preprocessing.job import describe_job
from megatron_adalrs.preprocessing.partial import Partial, Progress, partial_path

COMMIT_SECONDS = 30.0


@dataclass(frozen=True)
class Result:
    """Result of preprocessing a corpus.

    Attributes:
        description: Content of `PREFIX.json`.
        skipped: Number of documents without text.
        new_tokens: Number of tokens that this process encoded; the others were already in `PREFIX.partial`.
        seconds: Wall time of this process.
    """

    description: Description
    skipped: int
    new_tokens: int
    seconds: float


def require_new(prefix: Path | str, overwrite: bool) -> None:
    """Require that no file of the dataset exists, unless `overwrite` is set. Folders are never replaced.

    Raises:
        FileExistsError: If a file would be overwritten, or is a folder.
    """
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
    """Tokenize a corpus into an indexed dataset with one sequence per document.

    The result does not depend on `workers`, nor on interruptions: progress is committed to `PREFIX.partial`
    every `commit_seconds` and when an exception ends the work, and a later call with the same job resumes
    from the last commit. Input after that position may have changed in the meantime, for example to fix an
    invalid line. Existing files with the final names are not changed until everything is tokenized.

    Args:
        source: Corpus, see `documents.find_files`.
        output_prefix: Prefix of the dataset.
        recipe: Tokenizer and its settings.
        file_glob: Pattern of the files to read if `source` is a folder.
        workers: Number of processes.
        overwrite: Replace an existing dataset.
        restart: Discard unfinished work instead of resuming it.
        commit_seconds: Seconds between commits.
        on_resume: Called with the progress from which the work resumes.
        on_progress: Called with the number of input bytes of the earlier work and of every finished batch.

    Raises:
        FileExistsError: If an output exists and `overwrite` is not set.
        ValueError: If the input is malformed (FILE:LINE) or has no text, the tokenizer is not valid, or
            unfinished work belongs to another job, is in use or is damaged.
        OSError: If a file cannot be read or written.
    """
    if workers < 1:
        raise ValueError(f"workers {workers}: required at least 1")
    if not commit_seconds >= 0:
        raise ValueError(f"commit_seconds {commit_seconds}: required at least 0")
    started = time.perf_counter()
    source, encoder = Path(source), Encoder(recipe)
    files = _input_files(source, file_glob, partial_path(output_prefix))
    job = describe_job(encoder.tokenizer, recipe, source, files)
    if restart:  # before unfinished work is discarded
        require_new(output_prefix, overwrite)
    # Partial is the inner context, so that it commits before the workers are shut down, which may take long.
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
        # Publishing removes an old index first. An index next to unpublished tokens was created after the
        # outputs were checked.
        if work.has_tokens and idx_path(output_prefix).exists():
            require_new(output_prefix, overwrite)
        work.publish(bin_path(output_prefix), idx_path(output_prefix), description_path(output_prefix))
        seconds = time.perf_counter() - started
    return Result(description, done.skipped, done.tokens - before.tokens, seconds)


def _input_files(source: Path, file_glob: str, unfinished: Path) -> list[Path]:
    """Return the input files, without those of the unfinished work if it is inside the input folder."""
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
