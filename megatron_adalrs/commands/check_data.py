"""Check an indexed dataset: its files fit each other and, if a tokenizer is named, it was made with that tokenizer.

    python tools/check_dataset.py data/corpus --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model

Exit code 0 if all is well, 2 with one message if not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_adalrs.config.data import TokenizerKind
from megatron_adalrs.data.description import description_path, read_description, require_what_made
from megatron_adalrs.data.indexed_dataset import IndexedDataset
from megatron_adalrs.data.tokenizer import build_tokenizer, files_named


@dataclass(frozen=True)
class Arguments:
    data_path: tyro.conf.Positional[Path]
    """Prefix of the dataset: PREFIX.bin and PREFIX.idx."""
    tokenizer_type: TokenizerKind | None = None
    """Kind of tokenizer that it should have been made with."""
    tokenizer_model: Path | None = None
    """The tokenizer's file (or folder)."""
    vocab_file: Path | None = None
    """GPT2BPETokenizer's vocab.json."""
    merge_file: Path | None = None
    """GPT2BPETokenizer's merges.txt."""


def main(given: Sequence[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, args=given, description=__doc__)
    try:
        dataset = IndexedDataset(arguments.data_path)
        if arguments.tokenizer_type:
            require_tokenizer(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{arguments.data_path}: {dataset.num_documents} documents, {dataset.num_tokens} tokens of {dataset.dtype}"
    )
    return 0


def require_tokenizer(arguments: Arguments) -> None:
    tokenizer = build_tokenizer(arguments.tokenizer_type or "", *files_named(arguments))
    description = read_description(arguments.data_path)
    if description is None:
        raise ValueError(
            f"{description_path(arguments.data_path)} is missing: nothing tells which tokenizer was used"
        )
    named = arguments.tokenizer_model or arguments.vocab_file or arguments.tokenizer_type
    require_what_made(arguments.data_path, description, tokenizer, f"tokenizer_type: {named}")
