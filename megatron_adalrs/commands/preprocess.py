"""Turn a JSON-lines file, or a folder of text files, into a Megatron indexed dataset.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model --workers 4

writes data/corpus.bin, data/corpus.idx and data/corpus.json; `--data-path data/corpus` trains on them. Interrupted or
killed, the same command goes on from what lies in data/corpus.partial, with any number of workers; so it does once a
bad line at which it ended is mended.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from megatron_adalrs.config.data import TokenizerKind
from megatron_adalrs.preprocessing.documents import documents_size, find_files
from megatron_adalrs.preprocessing.partial import Progress, partial_path
from megatron_adalrs.preprocessing.preprocess import COMMIT_SECONDS, Recipe, Result, preprocess


@dataclass(frozen=True)
class Arguments:
    """Turn JSON lines, Parquet, or a folder of such files or of texts into a Megatron indexed dataset."""

    input: Path
    """A .jsonl or .json file with one object a line (.gz and .zst too), a .parquet file, or a folder of files."""
    output_prefix: Path
    """Where to write: PREFIX.bin, PREFIX.idx and PREFIX.json."""
    tokenizer_type: TokenizerKind
    """Kind of tokenizer."""
    tokenizer_model: Path | None = None
    """The .model file of SentencePiece, or the tokenizer.json (or its folder) of Hugging Face."""
    vocab_file: Path | None = None
    """GPT2BPETokenizer's vocab.json."""
    merge_file: Path | None = None
    """GPT2BPETokenizer's merges.txt."""
    json_key: Annotated[str, tyro.conf.arg(aliases=("--json-keys",))] = "text"
    """The key, or Parquet's column, that holds a document's text."""
    file_glob: str = "**/*.txt"
    """Which files of a folder to read: JSON lines and Parquet by their names, any other file as one document."""
    append_eod: bool = True
    """End every document with the tokenizer's end-of-document token."""
    workers: int = 1
    """Processes that tokenize; the output is the same for any number."""
    overwrite: bool = False
    """Replace an output that exists."""
    restart: bool = False
    """Throw away what an interrupted run has left in PREFIX.partial, in place of going on from there."""
    commit_seconds: float = COMMIT_SECONDS
    """How often what is done is brought to disk: the most that a kill costs."""


def run(arguments: Arguments) -> Result:
    recipe = Recipe(
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_model=arguments.tokenizer_model,
        json_key=arguments.json_key,
        append_eod=arguments.append_eod,
        vocab_file=arguments.vocab_file,
        merge_file=arguments.merge_file,
    )
    size = documents_size(find_files(arguments.input, arguments.file_glob))

    def tell(progress: Progress) -> None:
        print(
            f"going on from {partial_path(arguments.output_prefix)}: {progress.documents} documents, {progress.tokens} "
            f"tokens, of {progress.input_bytes} of the input's {size} bytes",
            file=sys.stderr,
        )

    # disable=None: a bar only where there is a terminal to draw it on
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
            on_resume=tell,
            on_progress=bar.update,
        )


class Terminated(BaseException):
    """SIGTERM has come. As with Ctrl-C, whatever was being done is left from where it stands."""


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        result = run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as stop:
        print("interrupted: what is done is kept, the same command goes on from there", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    made = result.description
    print(
        f"{arguments.output_prefix}: {made.documents} documents ({result.skipped} empty ones skipped), "
        f"{made.tokens} tokens of type {made.dtype}, {result.new_tokens / result.seconds:.0f} tokens/s"
    )
    return 0
