r"""Tokenize JSON lines, Parquet or text files into a Megatron indexed dataset.

    megatron-adalrs preprocess --input corpus.jsonl --output-prefix data/corpus \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model --workers 4

This writes data/corpus.bin, data/corpus.idx and data/corpus.json; train on them with `--data-path
data/corpus`. If the command is interrupted, killed, or stopped by an invalid line, run it again to continue
from data/corpus.partial. The number of workers may then be different.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from megatron_adalrs.cli.program import TokenizerFiles, parse_flags, reports_errors
from megatron_adalrs.config.data import TokenizerKind
from megatron_adalrs.preprocessing.documents import documents_size, find_files
from megatron_adalrs.preprocessing.encoding import Recipe
from megatron_adalrs.preprocessing.partial import Progress, partial_path
from megatron_adalrs.preprocessing.preprocess import COMMIT_SECONDS, Result, preprocess


@dataclass(frozen=True)
class Arguments(TokenizerFiles):
    input: Path
    """A .jsonl or .json file with one object per line (optionally .gz or .zst), a .parquet file, or a
    folder."""
    output_prefix: Path
    """Prefix of the output: PREFIX.bin, PREFIX.idx and PREFIX.json are written."""
    tokenizer_type: TokenizerKind
    """Kind of tokenizer."""
    json_key: Annotated[str, tyro.conf.arg(aliases=("--json-keys",))] = "text"
    """JSON key or Parquet column that holds the text of a document."""
    file_glob: str = "**/*.txt"
    """Pattern of the files to read if the input is a folder. The file name's extension selects JSON lines or
    Parquet; any other file is read as one document."""
    append_eod: bool = True
    """Append the tokenizer's end-of-document token to every document."""
    workers: int = 1
    """Number of processes that tokenize. The output does not depend on it."""
    overwrite: bool = False
    """Replace an existing output."""
    restart: bool = False
    """Start again instead of continuing an interrupted run from PREFIX.partial."""
    commit_seconds: float = COMMIT_SECONDS
    """Seconds between writes of the progress to disk, and so the most work that is lost if the process is
    killed."""


def run(arguments: Arguments) -> Result:
    """Preprocess with a progress bar."""
    recipe = Recipe(
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_model=arguments.tokenizer_model,
        json_key=arguments.json_key,
        append_eod=arguments.append_eod,
        vocab_file=arguments.vocab_file,
        merge_file=arguments.merge_file,
    )
    size = documents_size(find_files(arguments.input, arguments.file_glob))

    def print_resume(progress: Progress) -> None:
        print(
            f"continuing from {partial_path(arguments.output_prefix)}: {progress.documents} documents, "
            f"{progress.tokens} tokens, of {progress.input_bytes} of the input's {size} bytes",
            file=sys.stderr,
        )

    def advance(input_bytes: int) -> None:
        bar.update(input_bytes)

    # disable=None draws the bar only on a terminal
    with tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        return preprocess(
            arguments.input,
            arguments.output_prefix,
            recipe,
            file_glob=arguments.file_glob,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            restart=arguments.restart,
            commit_seconds=arguments.commit_seconds,
            on_resume=print_resume,
            on_progress=advance,
        )


class Terminated(BaseException):
    """Raised by SIGTERM, so that it ends the command as Ctrl-C does."""


def _terminate(number: int, frame: object) -> None:
    raise Terminated


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Preprocess the corpus and print its size.

    Returns:
        0; 2 if the input or a flag is not valid; 130 or 143 after Ctrl-C or SIGTERM.
    """
    flags = parse_flags(Arguments, __doc__, arguments)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        result = run(flags)
    except (KeyboardInterrupt, Terminated) as stop:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    made = result.description
    print(
        f"{flags.output_prefix}: {made.documents} documents ({result.skipped} empty ones skipped), "
        f"{made.tokens} tokens of type {made.dtype}, {result.new_tokens / result.seconds:.0f} tokens/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
