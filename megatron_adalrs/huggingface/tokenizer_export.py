"""A run's tokenizer as AutoTokenizer of transformers reads one: tokenizer.json and tokenizer_config.json."""

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
from megatron_adalrs.huggingface.families import QWEN2
from megatron_adalrs.huggingface.sentencepiece_tokenizer import backend_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

END_OF_DOCUMENT = "<|endoftext|>"
_CODE = b"""from transformers import PreTrainedTokenizerFast


class PlainTokenizer(PreTrainedTokenizerFast):
    \"\"\"tokenizer.json as it is.\"\"\"
"""


def made_for_transformers(
    kind: str | None, files: Mapping[str, Path], model_type: str
) -> tuple[dict[str, bytes], str]:
    """Files to lie beside those of a run's tokenizer, so that AutoTokenizer gives the same ids; and what to
    tell.

    Args:
        kind: of the tokenizer; None where the files came with a model, and are whole.
        files: by Hugging Face's names.
        model_type: of config.json.
    """
    if kind is None or (TOKENIZER_JSON in files and kind != "HuggingFaceTokenizer"):
        return {}, ""
    named = (
        json_object(files[TOKENIZER_CONFIG]) if TOKENIZER_JSON in files and TOKENIZER_CONFIG in files else {}
    )
    if _is_heeded(named, model_type):
        return {}, ""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        made = TOKENIZER_CONFIG if TOKENIZER_JSON in files else TOKENIZER_JSON
        return {}, f"no {made} is made: it needs the package tokenizers: pip install 'megatron-adalrs[hf]'"
    if TOKENIZER_JSON in files:
        ours = HuggingFaceTokenizer(files[TOKENIZER_JSON])
        config = _config(ours.backend.id_to_token(ours.eod))
        if (
            ours.backend.encode_special_tokens
        ):  # set beside a file of another name, whose settings are not among these
            config["split_special_tokens"] = True
        return _with_config(
            {}, config | named | {"tokenizer_class": config["tokenizer_class"]}, model_type
        ), ""
    told = f"{TOKENIZER_JSON} is made of it, for the same ids from AutoTokenizer"
    if kind == "ByteTokenizer":
        told = (
            f"{TOKENIZER_JSON} is made: ids are the bytes of UTF-8, 256 ({END_OF_DOCUMENT}) ends a document"
        )
        return _made(_bytes(), END_OF_DOCUMENT, build_tokenizer(kind), kind, model_type), told
    if kind == "SentencePieceTokenizer" and SENTENCEPIECE_MODEL in files:
        ours = build_tokenizer(kind, files[SENTENCEPIECE_MODEL])
        backend, reason = backend_of(files[SENTENCEPIECE_MODEL].read_bytes())
        if backend is None:
            return {}, f"no {TOKENIZER_JSON} is made of it: {reason}"
        return _made(backend, backend.id_to_token(ours.eod), ours, kind, model_type), told
    if kind == "GPT2BPETokenizer" and VOCAB in files and MERGES in files:
        ours = GPT2BPETokenizer(files[VOCAB], files[MERGES])
        return _made(ours.backend, END_OF_DOCUMENT, ours, kind, model_type), told
    return {}, ""


def _is_heeded(config: Mapping[str, Any], model_type: str) -> bool:
    """Whether AutoTokenizer takes the class that a tokenizer_config.json names: it takes the one that is
    usual for the model where none is named, and Qwen2's for its models: see `_with_config`."""
    named = str(config.get("tokenizer_class", ""))
    return bool(named) and (
        model_type != QWEN2.model_type or named.startswith("Qwen2") or "auto_map" in config
    )


def _made(backend: Backend, eod: str, ours: Tokenizer, kind: str, model_type: str) -> dict[str, bytes]:
    """tokenizer.json and what belongs to it. Args: `eod`: the name of the token that ends a document."""
    config = _config(eod) | {
        # Whether what is spelled out in a text is no special token; tokenizer.json cannot say it.
        "split_special_tokens": backend.encode_special_tokens,
        MADE_FROM: {"tokenizer_type": kind, "sha256": ours.sha256},
    }
    return _with_config({TOKENIZER_JSON: backend.to_str(pretty=True).encode()}, config, model_type)


def _config(eod: str) -> dict[str, Any]:
    # No bos_token: training has seen the end of a document before each one, and evaluations begin with it
    # then.
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eod,
        "clean_up_tokenization_spaces": False,
    }


def _with_config(files: dict[str, bytes], config: dict[str, Any], model_type: str) -> dict[str, bytes]:
    if model_type == QWEN2.model_type:
        # Version 5 of transformers gives every model of this type Qwen's own normaliser and pre-tokenizer,
        # unless its tokenizer has code of its own, whether that is trusted and run or not.
        config = config | {
            "auto_map": {"AutoTokenizer": [f"{Path(PLAIN_TOKENIZER).stem}.PlainTokenizer"] * 2}
        }
        files = files | {PLAIN_TOKENIZER: _CODE}
    return files | {TOKENIZER_CONFIG: _json(config)}


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def _bytes() -> Backend:
    """ByteTokenizer's ids: every byte is a token, none are merged."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE({name: byte for byte, name in enumerate(_byte_names())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    backend.encode_special_tokens = True
    return backend


def _byte_names() -> list[str]:
    """GPT-2's characters for the 256 bytes: themselves where they can be seen, else from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = iter(range(256, 512))
    return [chr(byte if byte in seen else next(unseen)) for byte in range(256)]
