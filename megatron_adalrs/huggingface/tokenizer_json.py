"""A run's tokenizer as AutoTokenizer of transformers reads one: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_adalrs.data.tokenizer import build_tokenizer
from megatron_adalrs.huggingface.families import QWEN2
from megatron_adalrs.huggingface.sentencepiece_json import backend_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SENTENCEPIECE_MODEL = "tokenizer.model"
END_OF_DOCUMENT = "<|endoftext|>"
MADE_FROM = "made_from"
"""In tokenizer_config.json: kind and digest of the tokenizer that tokenizer.json was made from."""
_MODULE = "plain_tokenizer"  # see companions.py
_CODE = b"""from transformers import PreTrainedTokenizerFast


class PlainTokenizer(PreTrainedTokenizerFast):
    \"\"\"tokenizer.json as it is.\"\"\"
"""


def made_for_transformers(kind: str | None, files: Mapping[str, Path], model_type: str) -> tuple[dict[str, bytes], str]:
    """Files to lie beside those of a run's tokenizer, so that AutoTokenizer gives the same ids; and what to tell.

    Args:
        kind: of the tokenizer; None where the files came with a model, and are whole.
        files: by Hugging Face's names.
        model_type: of config.json.
    """
    if kind not in ("ByteTokenizer", "SentencePieceTokenizer", "HuggingFaceTokenizer"):
        return {}, ""
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        if TOKENIZER_JSON in files:
            return {}, ""
        return {}, f"no {TOKENIZER_JSON} is made: it needs the package tokenizers: pip install 'megatron-adalrs[hf]'"
    if kind == "ByteTokenizer":
        told = f"{TOKENIZER_JSON} is made: ids are the bytes of UTF-8, 256 ({END_OF_DOCUMENT}) ends a document"
        return _written(_bytes(), END_OF_DOCUMENT, kind, None, model_type), told
    if TOKENIZER_JSON in files:
        return _config_beside(files, model_type), ""
    if kind == "SentencePieceTokenizer" and SENTENCEPIECE_MODEL in files:
        model = files[SENTENCEPIECE_MODEL]
        backend, reason = backend_of(model.read_bytes())
        if backend is None:
            return {}, f"no {TOKENIZER_JSON} is made of it: {reason}"
        eod = backend.id_to_token(build_tokenizer(kind, model).eod)
        told = f"{TOKENIZER_JSON} is made of it, for the same ids from AutoTokenizer"
        return _written(backend, eod, kind, model, model_type), told
    return {}, ""


def _config_beside(files: Mapping[str, Path], model_type: str) -> dict[str, bytes]:
    """Without a tokenizer_config.json AutoTokenizer takes the class that is usual for the model, whatever there is."""
    if TOKENIZER_CONFIG in files:
        config = _object_in(files[TOKENIZER_CONFIG])
        is_qwen2 = str(config.get("tokenizer_class")).startswith("Qwen2")
        foreign = model_type == QWEN2.model_type and not is_qwen2 and "auto_map" not in config
        return _with_config({}, config | {"tokenizer_class": "PreTrainedTokenizerFast"}, model_type) if foreign else {}
    from tokenizers import Tokenizer as Backend

    path = files[TOKENIZER_JSON]
    eod = build_tokenizer("HuggingFaceTokenizer", path).eod
    return _with_config({}, _config(Backend.from_file(str(path)).id_to_token(eod)), model_type)


def made_from(files: Mapping[str, Path]) -> str | None:
    """The digest of the tokenizer that the tokenizer.json of a folder was made from; None: it was not made here."""
    source = _object_in(files[TOKENIZER_CONFIG]).get(MADE_FROM) if TOKENIZER_CONFIG in files else None
    return source.get("sha256") if isinstance(source, dict) else None


def _object_in(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}  # what came with a model is not judged here
    return content if isinstance(content, dict) else {}


def _written(backend: Backend, eod: str, kind: str, model: Path | None, model_type: str) -> dict[str, bytes]:
    config = _config(eod) | {
        "split_special_tokens": True,  # ours never take what is spelled out in a text for a special token
        MADE_FROM: {"tokenizer_type": kind, "sha256": build_tokenizer(kind, model).sha256},
    }
    return _with_config({TOKENIZER_JSON: backend.to_str(pretty=True).encode()}, config, model_type)


def _config(eod: str) -> dict[str, Any]:
    # No bos_token: training has seen the end of a document before each one, and evaluations begin with it then.
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eod, "clean_up_tokenization_spaces": False}


def _with_config(files: dict[str, bytes], config: dict[str, Any], model_type: str) -> dict[str, bytes]:
    if model_type == QWEN2.model_type:
        # Version 5 of transformers gives every model of this type Qwen's own normaliser and pre-tokenizer, unless its
        # tokenizer has code of its own, whether that is trusted and run or not.
        config = config | {"auto_map": {"AutoTokenizer": [f"{_MODULE}.PlainTokenizer"] * 2}}
        files = files | {f"{_MODULE}.py": _CODE}
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
