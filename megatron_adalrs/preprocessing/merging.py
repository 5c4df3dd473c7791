"""Concatenation of indexed datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_adalrs.data.description import (
    Description,
    description_path,
    read_description,
    write_description,
)
from megatron_adalrs.data.indexed_dataset import IndexedDataset
from megatron_adalrs.data.indexed_dataset_builder import IndexedDatasetBuilder
from megatron_adalrs.data.pair_files import bin_path
from megatron_adalrs.preprocessing.preprocess import require_new


def merge(prefixes: Sequence[Path], output_prefix: Path, overwrite: bool = False) -> Description | None:
    """Write a dataset with the documents of all inputs, in order.

    Existing files are not changed until all inputs are read.

    Returns:
        Description of the result, or None if an input has no description.

    Raises:
        ValueError: If there are fewer than two inputs, they differ in token type or tokenizer, one is
        damaged,
            or the output is one of them.
        FileExistsError: If an output exists and `overwrite` is not set.
        OSError: If a file cannot be read or written.
    """
    if len(prefixes) < 2:
        raise ValueError(f"input: {len(prefixes)} datasets: required at least two to merge")
    resolved = [bin_path(prefix).resolve() for prefix in prefixes]
    if bin_path(output_prefix).resolve() in resolved:
        raise ValueError(f"output_prefix: {output_prefix} is one of the inputs: required another")
    require_new(output_prefix, overwrite)
    description = _common_description(prefixes)
    output_prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedDatasetBuilder(output_prefix, IndexedDataset(prefixes[0]).dtype) as builder:
        for prefix in prefixes:
            builder.append(prefix)
        description_path(output_prefix).unlink(missing_ok=True)
        builder.finalize()
    if description is not None:
        write_description(output_prefix, description)
    return description


def _common_description(prefixes: Sequence[Path]) -> Description | None:
    notes = {prefix: note for prefix in prefixes if (note := read_description(prefix))}
    if not notes:
        return None
    first, note = next(iter(notes.items()))
    for prefix, other in notes.items():
        for name in ("tokenizer_sha256", "append_eod"):
            theirs, ours = getattr(other, name), getattr(note, name)
            if theirs != ours:
                raise ValueError(
                    f"{description_path(prefix)} has {name} {theirs}, {description_path(first)} has {ours}: "
                    "required the same"
                )
    if len(notes) < len(prefixes):
        return None
    total = {
        name: sum(getattr(notes[prefix], name) for prefix in prefixes) for name in ("documents", "tokens")
    }
    return replace(note, **total)
