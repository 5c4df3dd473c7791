"""Data and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_adalrs.config.base import Group


class DataConfig(Group):
    """Data and tokenizer."""

    data_path: str
    """Prefix of the preprocessed corpus: PREFIX.bin and PREFIX.idx, as tools/preprocess_data.py writes them."""
    split: str = "969,30,1"
    """Weights of the train, validation and test parts; whole documents, no overlap."""
    data_cache_path: Path | None = None
    """Folder for the sample indices. Default: a folder `cache` beside the data."""
    tokenizer_type: Literal["SentencePieceTokenizer", "HuggingFaceTokenizer", "ByteTokenizer"] | None = None
    """Tokenizer that the data was made with; used for the vocabulary size and its checks. Optional."""
    tokenizer_model: Path | None = None
    """The tokenizer's file (or folder)."""
