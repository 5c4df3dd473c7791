"""Turn a JSON-lines file, or a folder of text files, into a Megatron indexed dataset.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model --workers 4

writes data/corpus.bin, data/corpus.idx and data/corpus.json; `--data-path data/corpus` trains on them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from megatron_adalrs.config.data import TokenizerKind
from megatron_adalrs.data.documents import documents_size
from megatron_adalrs.data.preprocess import Recipe, Result, preprocess


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


def run(arguments: Arguments) -> Result:
    recipe = Recipe(
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_model=arguments.tokenizer_model,
        json_key=arguments.json_key,
        append_eod=arguments.append_eod,
        vocab_file=arguments.vocab_file,
        merge_file=arguments.merge_file,
    )
    size = documents_size(arguments.input, arguments.file_glob)
    # disable=None: a bar only where there is a terminal to draw it on
    with tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
        return preprocess(
            arguments.input,
            arguments.output_prefix,
            recipe,
            file_glob=arguments.file_glob,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            on_progress=bar.update,
        )


def main(given: Sequence[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, args=given, description=__doc__)
    try:
        result = run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    made = result.description
    print(
        f"{arguments.output_prefix}: {made.documents} documents ({result.skipped} empty ones skipped), "
        f"{made.tokens} tokens of type {made.dtype}, {made.tokens / result.seconds:.0f} tokens/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
