"""Export a run's tokenizer as tokenizer.json and tokenizer_config.json for AutoTokenizer of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_adalrs.data.tokenizer import (
    GPT2BPETokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    build_tokenizer,
    json_object,
)
from megatron_adalrs.huggingface.companion_files import (
    MADE_FROM,
    MERGES,
    PLAIN_TOKENIZER,
    SENTENCEPIECE_MODEL,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    VOCAB,
)
from megatron_adalrs.huggingface.sentencepiece_tokenizer import backend_of
from megatron_adalrs.huggingface.tensor_names import QWEN2

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END_OF_DOCUMENT = "<|endoftext|>"
MAX_LENGTH = "model_max_length"
"""Key in tokenizer_config.json: the longest sequence, beyond which transformers warns or truncates."""
_CODE = b"""from transformers import PreTrainedTokenizerFast


class PlainTokenizer(PreTrainedTokenizerFast):
    \"\"\"tokenizer.json as it is.\"\"\"
"""


def export_tokenizer(
    kind: str | None, files: Mapping[str, Path], model_type: str, max_positions: int
) -> tuple[dict[str, bytes], str]:
    """Convert a run's tokenizer, so that AutoTokenizer returns the same ids.

    Args:
        kind: Kind of the tokenizer; None if the files came with a model, whose export does not change them.
        files: Files of the tokenizer by their names in Hugging Face folders.
        model_type: `model_type` in config.json.
        max_positions: Positions of the model, which become `model_max_length` unless the files name another.

    Returns:
        Contents of the files to add to those of the tokenizer, and a note for the user.
    """
    if kind is None:
        return {}, ""
    made, note = _convert(kind, files, model_type)
    return made | _with_max_length(files, made, max_positions), note


def _with_max_length(
    files: Mapping[str, Path], made: Mapping[str, bytes], max_positions: int
) -> dict[str, bytes]:
    """Return tokenizer_config.json with the longest sequence, if there is a tokenizer that lacks it."""
    if not {TOKENIZER_JSON, TOKENIZER_CONFIG, VOCAB} & {*files, *made}:
        return {}
    config: dict[str, Any] = {}
    if TOKENIZER_CONFIG in made:
        config = json.loads(made[TOKENIZER_CONFIG])
    elif TOKENIZER_CONFIG in files:
        config = json_object(files[TOKENIZER_CONFIG])
    if config.get(MAX_LENGTH) is not None:
        return {}
    return {TOKENIZER_CONFIG: _json(config | {MAX_LENGTH: max_positions})}


def _convert(kind: str, files: Mapping[str, Path], model_type: str) -> tuple[dict[str, bytes], str]:
    """Return the files to add for the same ids, and a note for the user; see `export_tokenizer`."""
    if TOKENIZER_JSON in files and kind != "HuggingFaceTokenizer":
        return {}, ""
    named = (
        json_object(files[TOKENIZER_CONFIG]) if TOKENIZER_JSON in files and TOKENIZER_CONFIG in files else {}
    )
    if _has_tokenizer_class(named, model_type):
        return {}, ""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        made = TOKENIZER_CONFIG if TOKENIZER_JSON in files else TOKENIZER_JSON
        return {}, f"no {made} is made: it needs the package tokenizers: pip install 'megatron-adalrs[hf]'"
    if TOKENIZER_JSON in files:
        json_tokenizer = HuggingFaceTokenizer(files[TOKENIZER_JSON])
        config = _config(json_tokenizer.backend.id_to_token(json_tokenizer.eod))
        # Set by a tokenizer_config.json beside a file of another name, which is not among `files`.
        if json_tokenizer.backend.encode_special_tokens:
            config["split_special_tokens"] = True
        return _with_config(
            {}, config | named | {"tokenizer_class": config["tokenizer_class"]}, model_type
        ), ""
    note = f"{TOKENIZER_JSON} is made from it, for the same ids from AutoTokenizer"
    if kind == "ByteTokenizer":
        note = (
            f"{TOKENIZER_JSON} is made: ids are the bytes of UTF-8, 256 ({END_OF_DOCUMENT}) ends a document"
        )
        return _made(_bytes(), END_OF_DOCUMENT, build_tokenizer(kind), kind, model_type), note
    if kind == "SentencePieceTokenizer" and SENTENCEPIECE_MODEL in files:
        sentencepiece = build_tokenizer(kind, files[SENTENCEPIECE_MODEL])
        backend, reason = backend_of(files[SENTENCEPIECE_MODEL].read_bytes())
        if backend is None:
            return {}, f"no {TOKENIZER_JSON} is made from it: {reason}"
        eod = backend.id_to_token(sentencepiece.eod)
        assert eod is not None, "the backend has all pieces of the model"
        return _made(backend, eod, sentencepiece, kind, model_type), note
    if kind == "GPT2BPETokenizer" and VOCAB in files and MERGES in files:
        bpe = GPT2BPETokenizer(files[VOCAB], files[MERGES])
        return _made(bpe.backend, END_OF_DOCUMENT, bpe, kind, model_type), note
    return {}, ""


def _has_tokenizer_class(config: Mapping[str, Any], model_type: str) -> bool:
    """Return whether AutoTokenizer uses the class in a tokenizer_config.json.

    Without one it uses the default class of the model, and for Qwen2 models always that of Qwen2, see
    `_with_config`.
    """
    named = str(config.get("tokenizer_class", ""))
    return bool(named) and (
        model_type != QWEN2.model_type or named.startswith("Qwen2") or "auto_map" in config
    )


def _made(backend: Backend, eod: str, ours: Tokenizer, kind: str, model_type: str) -> dict[str, bytes]:
    """Return tokenizer.json and its configuration; `eod` is the name of the end-of-document token."""
    config = _config(eod) | {
        # Special tokens spelled out in a text are split; tokenizer.json has no field for it.
        "split_special_tokens": backend.encode_special_tokens,
        MADE_FROM: {"tokenizer_type": kind, "sha256": ours.sha256},
    }
    return _with_config({TOKENIZER_JSON: backend.to_str(pretty=True).encode()}, config, model_type)


def _config(eod: str) -> dict[str, Any]:
    # No bos_token: in training, documents follow the end-of-document token of the previous one, and
    # evaluations prepend it if there is no bos_token.
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eod,
        "clean_up_tokenization_spaces": False,
    }


def _with_config(files: dict[str, bytes], config: dict[str, Any], model_type: str) -> dict[str, bytes]:
    if model_type == QWEN2.model_type:
        # Version 5 of transformers replaces normalizer and pre-tokenizer with those of Qwen for all models of
        # this type, unless the tokenizer has custom code, whether or not that is trusted and run.
        config = config | {
            "auto_map": {"AutoTokenizer": [f"{Path(PLAIN_TOKENIZER).stem}.PlainTokenizer"] * 2}
        }
        files = files | {PLAIN_TOKENIZER: _CODE}
    return files | {TOKENIZER_CONFIG: _json(config)}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def _bytes() -> Backend:
    """Return a backend with the ids of ByteTokenizer: one token per byte, without merges."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE({name: byte for byte, name in enumerate(_byte_names())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    backend.encode_special_tokens = True
    return backend


def _byte_names() -> list[str]:
    """Return the characters of GPT-2 for the 256 bytes: printable ones as they are, others from U+0100."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = iter(range(256, 512))
    return [chr(byte if byte in seen else next(unseen)) for byte in range(256)]
