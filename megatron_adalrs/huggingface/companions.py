"""The files beside the weights: tokenizers and settings of generation. They are copied as they are, and completed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_adalrs.huggingface.families import QWEN2, Family

GENERATION = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER = (
    TOKENIZER_FILE, TOKENIZER_CONFIG, "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TOKENIZER_FOLDER = "tokenizer"
"""Of a model folder in which transformers would not read tokenizer.json as it is: another, where it does."""
_QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")


def companions_in(folder: Path) -> dict[str, Path]:
    """Those that a folder has, by their names."""
    return {name: folder / name for name in (*TOKENIZER, GENERATION) if (folder / name).is_file()}


def copy_companions(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files to these names. Raises OSError: one cannot be read or written."""
    for name, file in files.items():
        shutil.copyfile(file, folder / name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Raises OSError: it cannot be written."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def complete_tokenizer(folder: Path, family: Family, token_ids: Mapping[str, Any], max_positions: int) -> None:
    """Write what transformers needs to read a model folder's tokenizer.json for what it is.

    Where there is no tokenizer_config.json it takes a class by the kind of model, and most of these know no end of a
    document, without which lm_eval cannot begin. For Qwen2 transformers 5 takes that class whatever is named, with
    Qwen2's way to split a text: where another is named, the tokenizer is once more in a folder without config.json.

    Args:
        token_ids: bos_token_id, eos_token_id, pad_token_id, as far as they are known.
        max_positions: tokens that a sequence may have.

    Raises:
        OSError: a file cannot be read or written.
    """
    tokenizer, config = folder / TOKENIZER_FILE, folder / TOKENIZER_CONFIG
    content = _read_object(tokenizer)
    names = {name.removesuffix("_id"): _token(content, number) for name, number in token_ids.items()}
    if not config.exists() and names.get("eos_token"):
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_positions,
            "clean_up_tokenization_spaces": False,
        }
        write_json(config, settings | {name: token for name, token in names.items() if token})
    if family is QWEN2 and _read_object(config).get("tokenizer_class") not in (None, *_QWEN2_CLASSES):
        (folder / TOKENIZER_FOLDER).mkdir()
        copy_companions({path.name: path for path in (tokenizer, config)}, folder / TOKENIZER_FOLDER)


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none: what is copied is not ours to judge."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _token(tokenizer: Mapping[str, Any], number: Any) -> str | None:
    """The text of a token, as tokenizer.json spells it; None where it has no such token."""
    if type(number) is not int:  # Llama's config.json may have a list
        return None
    try:
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # of pieces with their scores, in the order of their numbers
            vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
        known = {index: token for token, index in vocabulary.items()}
        known |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return known.get(number)
