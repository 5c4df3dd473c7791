"""Tokenizers behind one small protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, get_args

from megatron_adalrs.config.data import TokenizerKind

TOKENIZER_KINDS: tuple[str, ...] = get_args(TokenizerKind)
_END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")


class Tokenizer(Protocol):
    """Text to token ids and back.

    `vocab_size`: every id is below it. `eod`: the id that ends a document. `sha256`: hex digest of the model
    file (of the name, for a tokenizer without one), to tell whether data and model were made with the same
    tokenizer.
    """

    vocab_size: int
    eod: int
    sha256: str

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with no marker around them. Raises UnicodeEncodeError for unpaired surrogates."""
        ...

    def decode(self, ids: list[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes are their own ids; 256 ends a document. Needs no file."""

    def __init__(self) -> None:
        self.vocab_size = 257
        self.eod = 256
        self.sha256 = hashlib.sha256(b"ByteTokenizer").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token != self.eod).decode(errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece `.model` file; its end-of-sentence id ends a document."""

    def __init__(self, model_path: Path | str) -> None:
        from sentencepiece import SentencePieceProcessor

        model = _model_file(model_path).read_bytes()
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{model_path} is not a SentencePiece model: {error}") from error
        self.vocab_size: int = self._processor.vocab_size()
        self.eod: int = self._processor.eos_id()
        self.sha256 = hashlib.sha256(model).hexdigest()
        if self.eod < 0:
            raise ValueError(f"{model_path} has no end-of-sentence piece: required, it ends a document")

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text.encode(), out_type=int)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`, or the folder that holds it.

    The end of a document is the `eos_token` of a `tokenizer_config.json` beside it, else the first known of
    <|endoftext|>, </s>, <eos>, <|end_of_text|>, else the only special token. As in Hugging Face, a special
    token that is spelled out in a text is encoded as that token, unless that file has `split_special_tokens`.
    """

    def __init__(self, model_path: Path | str) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise ValueError(
                "HuggingFaceTokenizer needs the package tokenizers: pip install 'megatron-adalrs[hf]'"
            ) from error
        path = Path(model_path)
        path = _model_file(path / "tokenizer.json" if path.is_dir() else path)
        model = path.read_bytes()
        try:
            self._backend = Backend.from_buffer(model)
        except Exception as error:  # the package raises bare Exception for whatever it cannot read
            raise ValueError(f"{path} is not a Hugging Face tokenizer: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.sha256 = hashlib.sha256(model).hexdigest()
        special = [token.content for token in self._backend.get_added_tokens_decoder().values() if token.special]
        settings = _settings(path.with_name("tokenizer_config.json"))
        self._backend.encode_special_tokens = settings.get("split_special_tokens") is True
        candidates = [*_configured_eos(settings), *_END_OF_DOCUMENT]
        if len(special) == 1:
            candidates += special
        known = [token for token in candidates if token in vocabulary]
        if not known:
            raise ValueError(f"{path} has none of {', '.join(candidates)}: one is required, it ends a document")
        self.eod: int = vocabulary[known[0]]

    def encode(self, text: str) -> list[int]:
        text.encode()  # the package would silently replace unpaired surrogates
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


_FROM_FILE: dict[str, Callable[[Path | str], Tokenizer]] = {
    "SentencePieceTokenizer": SentencePieceTokenizer,
    "HuggingFaceTokenizer": HuggingFaceTokenizer,
}


def build_tokenizer(kind: str, model_path: Path | str | None = None) -> Tokenizer:
    """The tokenizer of one of `TOKENIZER_KINDS`.

    Raises ValueError for an unknown kind, a missing or superfluous path, a model that cannot be read or that
    has no end of document; FileNotFoundError if the file is not there.
    """
    if kind not in TOKENIZER_KINDS:
        raise ValueError(f"tokenizer type {kind!r}: required one of {', '.join(TOKENIZER_KINDS)}")
    if kind == "ByteTokenizer":
        if model_path is not None:
            raise ValueError(f"tokenizer model {model_path}: ByteTokenizer takes none")
        return ByteTokenizer()
    if model_path is None:
        raise ValueError(f"tokenizer model: required for {kind}")
    return _FROM_FILE[kind](model_path)


def _model_file(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer model {path}: there is no such file")
    return path


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a JSON object: {settings!r:.40}")
    return settings


def _configured_eos(settings: dict[str, Any]) -> list[str]:
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return [token] if isinstance(token, str) else []
