"""The files beside the weights: tokenizers and settings of generation. They are copied as they are."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

GENERATION = "generation_config.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def companions_in(folder: Path) -> dict[str, Path]:
    """Those that a folder has, by their names."""
    return {name: folder / name for name in (*TOKENIZER, GENERATION) if (folder / name).is_file()}


def copy_companions(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files to these names. Raises OSError: one cannot be read or written."""
    for name, file in files.items():
        shutil.copyfile(file, folder / name)
