"""Check the files of an indexed dataset, and optionally the tokenizer that it was made with.

    megatron-adalrs check-data data/corpus
    megatron-adalrs check-data data/corpus --tokenizer-type SentencePieceTokenizer --tokenizer-model t.model

The exit code is 0 if the dataset is valid; otherwise it is 2 and the first problem is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tyro

from megatron_adalrs.cli.program import TokenizerFlags, parse_flags, reports_errors
from megatron_adalrs.data.description import description_path, read_description, require_tokenizer
from megatron_adalrs.data.indexed_dataset import IndexedDataset
from megatron_adalrs.data.tokenizer import build_tokenizer, tokenizer_paths


@dataclass(frozen=True)
class Arguments(TokenizerFlags):
    data_path: tyro.conf.Positional[Path]
    """Prefix of the dataset: PREFIX.bin and PREFIX.idx."""


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Check the dataset and print its size.

    Returns:
        0, or 2 if the dataset or the command line is not valid.
    """
    flags = parse_flags(Arguments, __doc__, arguments)
    dataset = IndexedDataset(flags.data_path)
    if flags.tokenizer_type:
        _require_same_tokenizer(flags)
    size = f"{dataset.num_documents} documents, {dataset.num_tokens} tokens of {dataset.dtype}"
    print(f"{flags.data_path}: {size}")
    if dataset.modes is not None:
        print(_describe_modes(dataset.modes))
    return 0


def _describe_modes(modes: npt.NDArray[np.int8]) -> str:
    """Describe the sequences of a multimodal dataset."""
    counts = (
        f"{count} of mode {mode}{' (text)' if mode == 0 else ''}"
        for mode, count in zip(
            *(found.tolist() for found in np.unique(modes, return_counts=True)), strict=True
        )
    )
    note = "" if not modes.any() else "; only text can be trained on here"
    return f"multimodal, sequences: {', '.join(counts)}{note}"


def _require_same_tokenizer(flags: Arguments) -> None:
    """Raise ValueError unless the dataset was made with the tokenizer of the flags."""
    tokenizer = build_tokenizer(flags.tokenizer_type or "", *tokenizer_paths(flags))
    description = read_description(flags.data_path)
    if description is None:
        raise ValueError(
            f"{description_path(flags.data_path)} is missing: it records which tokenizer was used"
        )
    named = flags.tokenizer_model or flags.vocab_file or flags.tokenizer_type
    require_tokenizer(flags.data_path, description, tokenizer, f"tokenizer_type: {named}")


if __name__ == "__main__":
    sys.exit(main())
