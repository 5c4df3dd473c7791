"""The files beside the weights: tokenizers and settings of generation."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.data.tokenizer import Tokenizer, build_tokenizer, digest_of_files, json_object
from megatron_adalrs.huggingface.config_json import family_of
from megatron_adalrs.huggingface.families import GPT2

GENERATION = "generation_config.json"
TOKENIZER_JSON, TOKENIZER_CONFIG, SENTENCEPIECE_MODEL = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
)
VOCAB, MERGES = "vocab.json", "merges.txt"
PLAIN_TOKENIZER = "plain_tokenizer.py"  # of an export: see tokenizer_json.py
TOKENIZER = (
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    SENTENCEPIECE_MODEL,
    "special_tokens_map.json",
    "added_tokens.json",
    VOCAB,
    MERGES,
    "chat_template.jinja",
    "chat_template.json",
    PLAIN_TOKENIZER,
)
FORMS = {
    "HuggingFaceTokenizer": (TOKENIZER_JSON,),
    "SentencePieceTokenizer": (SENTENCEPIECE_MODEL,),
    "GPT2BPETokenizer": (VOCAB, MERGES),
}
"""The files that make a tokenizer of a kind."""
MADE_FROM = "made_from"
"""In tokenizer_config.json: kind and digest of the tokenizer that an export's tokenizer.json was made
from."""


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


def digests_of(files: Mapping[str, Path]) -> dict[str, str]:
    """Of the tokenizers that there are files of, or that these were made from: digests as data notes them, by
    kinds.

    Raises:
        OSError: one cannot be read.
        ValueError: tokenizer_config.json is no JSON object.
    """
    digests = {}
    for kind, names in FORMS.items():
        if all(name in files and files[name].is_file() for name in names):
            digests[kind] = digest_of_files(kind, *(files[name] for name in names))
    return digests and digests | made_from(files)


def made_from(files: Mapping[str, Path]) -> dict[str, str]:
    """Kind and digest that an export notes of the tokenizer that it is of; empty: nothing is noted."""
    if TOKENIZER_CONFIG not in files:
        return {}
    try:
        note = json_object(files[TOKENIZER_CONFIG])[MADE_FROM]
        return {str(note["tokenizer_type"]): str(note["sha256"])}
    except (ValueError, LookupError, TypeError):  # others write such files too
        return {}


def tokenizer_in(files: Mapping[str, Path], model: ModelConfig) -> Tokenizer | None:
    """The tokenizer that these files are for a model of this shape; None: none that can be told.

    Raises:
        ValueError: it cannot be read, or a package that it needs is not installed.
    """
    if TOKENIZER_JSON in files:
        return build_tokenizer("HuggingFaceTokenizer", files[TOKENIZER_JSON])
    if SENTENCEPIECE_MODEL in files:
        return build_tokenizer("SentencePieceTokenizer", files[SENTENCEPIECE_MODEL])
    # Other families have files of these names, too, and split texts into words by rules of their own.
    if VOCAB in files and MERGES in files and family_of(model) is GPT2:
        return build_tokenizer("GPT2BPETokenizer", None, files[VOCAB], files[MERGES])
    return None
