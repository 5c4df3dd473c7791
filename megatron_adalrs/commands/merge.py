"""Merge indexed datasets into one, with their documents in the order of the inputs.

    megatron-adalrs merge --input data/part1 data/part2 --output-prefix data/corpus

This is meant for the parts of one corpus that was tokenized on several machines. To mix corpora in given
proportions, pass a blend to `pretrain` instead: --data-path 0.7 data/web 0.3 data/code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_adalrs.cli.program import parse_flags, reports_errors
from megatron_adalrs.data.indexed_dataset import IndexedDataset
from megatron_adalrs.preprocessing.merging import merge


@dataclass(frozen=True)
class Arguments:
    input: tuple[Path, ...]
    """Prefixes of the datasets to merge, at least two."""
    output_prefix: Path
    """Prefix of the output: PREFIX.bin, PREFIX.idx and, if every input has one, PREFIX.json are written."""
    overwrite: bool = False
    """Replace an existing output."""


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Merge the datasets and print the size of the result.

    Returns:
        0, or 2 if they cannot be merged.
    """
    flags = parse_flags(Arguments, __doc__, arguments)
    description = merge(flags.input, flags.output_prefix, flags.overwrite)
    made = IndexedDataset(flags.output_prefix)
    print(f"{flags.output_prefix}: {made.num_documents} documents, {made.num_tokens} tokens of {made.dtype}")
    if description is None:
        print("no PREFIX.json is written, because an input has none: the tokenizer is not recorded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
