"""Train a SentencePiece tokenizer on a corpus.

    python tools/train_tokenizer.py --input corpus.jsonl --output data/tokenizer.model --vocab-size 8192

The model gives back any text it encodes: no normalisation, byte fallback, newlines and runs of blanks kept.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from megatron_adalrs.data.tokenizer import build_tokenizer
from megatron_adalrs.preprocessing.tokenizer_training import train_sentencepiece


@dataclass(frozen=True)
class Arguments:
    input: Path
    """A .jsonl or .json file with one object a line (.gz too), or a folder of text files."""
    output: Path
    """The .model file to write."""
    vocab_size: int
    """Number of pieces, bytes and control tokens included."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """Kind of SentencePiece model."""
    sample_mb: int = 10
    """Megabytes of lines, spread evenly over the corpus, that the model is trained on."""
    json_key: str = "text"
    """The key that holds a document's text."""
    file_glob: str = "**/*.txt"
    """Which files of a folder to read."""


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        train_sentencepiece(
            [arguments.input],
            arguments.output,
            arguments.vocab_size,
            model_type=arguments.model_type,
            sample_bytes=arguments.sample_mb * 1_000_000,
            json_key=arguments.json_key,
            file_glob=arguments.file_glob,
        )
        tokenizer = build_tokenizer("SentencePieceTokenizer", arguments.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {tokenizer.vocab_size} tokens, end of document {tokenizer.eod}")
    return 0
