"""Small corpora that tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_adalrs.data.indexed_dataset_builder import IndexedDatasetBuilder


def counting_corpus(prefix: Path) -> Path:
    """200 documents of 100 tokens that count from random starts, modulo 50. Returns the prefix."""
    random = np.random.default_rng(0)
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for _ in range(200):
            builder.add_document((random.integers(0, 50) + np.arange(100)) % 50)
        builder.finalize()
    return prefix
