"""Train a SentencePiece tokenizer on a corpus.

    megatron-adalrs train-tokenizer --input corpus.jsonl --output data/tokenizer.model --vocab-size 8192

Encoding is lossless: text is not normalised, newlines and repeated spaces are kept, and unknown characters
are encoded as bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_adalrs.cli.program import parse_flags, reports_errors
from megatron_adalrs.data.tokenizer import build_tokenizer
from megatron_adalrs.preprocessing.tokenizer_training import train_sentencepiece


@dataclass(frozen=True)
class Arguments:
    input: Path
    """A .jsonl or .json file with one object per line (optionally .gz), or a folder of text files."""
    output: Path
    """The .model file to write."""
    vocab_size: int
    """Number of tokens, including the byte and control tokens."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """Kind of SentencePiece model."""
    sample_mb: int = 10
    """Size of the sample to train on, in megabytes; its lines are spread evenly over the corpus."""
    json_key: str = "text"
    """JSON key that holds the text of a document."""
    file_glob: str = "**/*.txt"
    """Pattern of the files to read if the input is a folder."""


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Train the tokenizer and print its vocabulary size.

    Returns:
        0, or 2 if it cannot be trained.
    """
    flags = parse_flags(Arguments, __doc__, arguments)
    train_sentencepiece(
        [flags.input],
        flags.output,
        flags.vocab_size,
        model_type=flags.model_type,
        sample_bytes=flags.sample_mb * 1_000_000,
        json_key=flags.json_key,
        file_glob=flags.file_glob,
    )
    tokenizer = build_tokenizer("SentencePieceTokenizer", flags.output)
    print(f"{flags.output}: {tokenizer.vocab_size} tokens, end of document {tokenizer.eod}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
