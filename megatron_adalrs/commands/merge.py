"""Merge indexed datasets into one: the documents of the first, then those of the second, and so on.

    python tools/merge_datasets.py --input data/part1 data/part2 --output-prefix data/corpus

For parts of one corpus that were tokenized on several machines. To mix corpora in proportions, give them to
pretrain_gpt.py as a blend instead: --data-path 0.7 data/web 0.3 data/code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_adalrs.data.indexed_dataset import IndexedDataset
from megatron_adalrs.preprocessing.merging import merge


@dataclass(frozen=True)
class Arguments:
    input: tuple[Path, ...]
    """Prefixes of the datasets, at least two."""
    output_prefix: Path
    """Where to write: PREFIX.bin, PREFIX.idx and, if every input has one, PREFIX.json."""
    overwrite: bool = False
    """Replace an output that exists."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 where it was asked for something impossible."""
    given = tyro.cli(Arguments, args=arguments, description=__doc__)
    try:
        description = merge(given.input, given.output_prefix, given.overwrite)
        made = IndexedDataset(given.output_prefix)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.output_prefix}: {made.num_documents} documents, {made.num_tokens} tokens of {made.dtype}")
    if description is None:
        print("no PREFIX.json: one of the inputs has none, so that nothing tells the tokenizer")
    return 0
