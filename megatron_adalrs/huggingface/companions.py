"""The files beside the weights: tokenizers and settings of generation."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

GENERATION = "generation_config.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "plain_tokenizer.py",
)  # fmt: skip


def companions_in(folder: Path) -> dict[str, Path]:
    """Those that a folder has, by their names."""
    return {name: folder / name for name in (*TOKENIZER, GENERATION) if (folder / name).is_file()}


def copy_companions(files: Mapping[str, Path | bytes], folder: Path) -> None:
    """Copy files, or write contents, to these names. Raises OSError: one cannot be read or written."""
    for name, file in files.items():
        if isinstance(file, bytes):
            (folder / name).write_bytes(file)
        else:
            shutil.copyfile(file, folder / name)
