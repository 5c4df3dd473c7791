"""Files beside the weights of a model: its tokenizer and its generation settings."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.data.tokenizer import Tokenizer, build_tokenizer, digest_of_files, json_object
from megatron_adalrs.huggingface.config_json import family_of
from megatron_adalrs.huggingface.tensor_names import GPT2

GENERATION = "generation_config.json"
TOKENIZER_JSON, TOKENIZER_CONFIG, SENTENCEPIECE_MODEL = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
)
VOCAB, MERGES = "vocab.json", "merges.txt"
PLAIN_TOKENIZER = "plain_tokenizer.py"  # written by an export: see tokenizer_export.py
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
"""Files of each kind of tokenizer."""
MADE_FROM = "made_from"
"""Key in tokenizer_config.json: kind and digest of the tokenizer that an export was made from."""


def find_companion_files(folder: Path) -> dict[str, Path]:
    """Return the companion files of a folder by name."""
    return {name: folder / name for name in (*TOKENIZER, GENERATION) if (folder / name).is_file()}


def copy_companion_files(files: Mapping[str, Path | bytes], folder: Path) -> None:
    """Copy files, or write their contents, into a folder under the given names."""
    for name, file in files.items():
        if isinstance(file, bytes):
            (folder / name).write_bytes(file)
        else:
            shutil.copyfile(file, folder / name)


def tokenizer_digests(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the digests of the tokenizers in these files, and of those that they were made from, by kind.

    Raises:
        OSError: A file cannot be read.
        ValueError: tokenizer_config.json is not a JSON object.
    """
    digests = {}
    for kind, names in FORMS.items():
        if all(name in files and files[name].is_file() for name in names):
            digests[kind] = digest_of_files(kind, *(files[name] for name in names))
    return digests and digests | made_from(files)


def made_from(files: Mapping[str, Path]) -> dict[str, str]:
    """Return kind and digest of the tokenizer that an export was made from; empty if they are unknown."""
    if TOKENIZER_CONFIG not in files:
        return {}
    try:
        note = json_object(files[TOKENIZER_CONFIG])[MADE_FROM]
        return {str(note["tokenizer_type"]): str(note["sha256"])}
    except (ValueError, LookupError, TypeError):  # a file that another program wrote
        return {}


def tokenizer_in(files: Mapping[str, Path], model: ModelConfig) -> Tokenizer | None:
    """Build the tokenizer of these files for a model.

    Returns:
        None if its kind cannot be determined.

    Raises:
        ValueError: The tokenizer cannot be read, or a package that it needs is not installed.
    """
    if TOKENIZER_JSON in files:
        return build_tokenizer("HuggingFaceTokenizer", files[TOKENIZER_JSON])
    if SENTENCEPIECE_MODEL in files:
        return build_tokenizer("SentencePieceTokenizer", files[SENTENCEPIECE_MODEL])
    # Other families have files of the same names, but split text into words differently.
    if VOCAB in files and MERGES in files and family_of(model) is GPT2:
        return build_tokenizer("GPT2BPETokenizer", None, files[VOCAB], files[MERGES])
    return None
