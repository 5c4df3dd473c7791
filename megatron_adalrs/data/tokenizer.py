"""Tokenizers with a common protocol."""

from __future__ import annotations

import hashlib
from codecs import BOM_UTF8
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

from megatron_adalrs.config.data import TokenizerKind
from megatron_adalrs.utils.text_files import parse_json

TOKENIZER_KINDS: tuple[str, ...] = get_args(TokenizerKind)
TOKENIZER_FILES = ("tokenizer_model", "vocab_file", "merge_file")
"""Names of a tokenizer's files in flags and descriptions, in the order of `build_tokenizer`'s arguments."""
_END_OF_DOCUMENT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")


class Tokenizer(Protocol):
    """Converts text to token ids and back.

    Attributes:
        vocab_size: Number of ids; every id is below it.
        eod: Id of the end-of-document token.
        sha256: Hex digest of the files (see `digest_of_files`), or of the name of a tokenizer without files.
            It identifies the tokenizer that data or a model was made with.
    """

    vocab_size: int
    eod: int
    sha256: str

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without added tokens.

        Raises:
            UnicodeEncodeError: If the text contains unpaired surrogates.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids. Ids beyond the vocabulary, which a padded model has, are ignored."""
        ...


@dataclass(frozen=True)
class DataTokenizer:
    """The tokenizer that the data of a run was encoded with."""

    kind: str
    sha256: str
    source: str
    """Path of its file, or of the description that records it."""
    files: tuple[Path | None, ...] | None
    """Arguments of `build_tokenizer`; None if the files are not known."""

    def build(self) -> Tokenizer | None:
        """Build the tokenizer, or return None if its files are not known.

        Raises:
            ValueError, OSError: As `build_tokenizer` does.
        """
        return None if self.files is None else build_tokenizer(self.kind, *self.files)


def tokenizer_paths(by: object) -> tuple[Any, ...]:
    """Return the fields `TOKENIZER_FILES` of an object, which are the arguments of `build_tokenizer`."""
    return tuple(getattr(by, name) for name in TOKENIZER_FILES)


class ByteTokenizer:
    """Tokenizer of UTF-8 bytes, which are their own ids; 256 is the end-of-document token. Needs no file."""

    def __init__(self) -> None:
        self.vocab_size = 257
        self.eod = 256
        self.sha256 = hashlib.sha256(b"ByteTokenizer").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token < self.eod).decode(errors="replace")


class SentencePieceTokenizer:
    """Tokenizer of a SentencePiece `.model` file; the end-of-sentence id is the end-of-document token."""

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
            raise ValueError(f"{model_path} has no end-of-sentence piece, which is required to end documents")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text.encode(), out_type=int)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._processor.decode([token for token in ids if token < self.vocab_size])
        return text


class _BackendTokenizer:
    """Base class of tokenizers of the package tokenizers. Raises ValueError if it is not installed."""

    def __init__(self) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(
                f"{type(self).__name__} needs the package tokenizers: pip install 'megatron-adalrs[hf]'"
            ) from error
        self._package = tokenizers
        self.backend: Any = None

    def encode(self, text: str) -> list[int]:
        text.encode()  # the package would silently replace unpaired surrogates
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self.backend.decode(ids, skip_special_tokens=False)
        return text


class HuggingFaceTokenizer(_BackendTokenizer):
    """Tokenizer of a Hugging Face `tokenizer.json`, or of the folder that contains it.

    The end-of-document token is the `eos_token` of the `tokenizer_config.json` next to it, else the first of
    <|endoftext|>, </s>, <eos> and <|end_of_text|> in the vocabulary, else the only special token. As in
    Hugging Face, the text of a special token is encoded as that token, unless `tokenizer_config.json` sets
    `split_special_tokens`.
    """

    def __init__(self, model_path: Path | str) -> None:
        super().__init__()
        path = Path(model_path)
        path = _model_file(path / "tokenizer.json" if path.is_dir() else path)
        model = path.read_bytes()
        try:
            self.backend = self._package.Tokenizer.from_buffer(model.removeprefix(BOM_UTF8))
        except Exception as error:  # the package raises bare Exception for whatever it cannot read
            raise ValueError(f"{path} is not a Hugging Face tokenizer: {error}") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.sha256 = digest_of_files("HuggingFaceTokenizer", path)
        special = [
            token.content for token in self.backend.get_added_tokens_decoder().values() if token.special
        ]
        settings = _settings(path)
        self.backend.encode_special_tokens = _splits_special_tokens(settings)
        candidates = [*_configured_eos(settings), *_END_OF_DOCUMENT]
        if len(special) == 1:
            candidates += special
        known = [token for token in candidates if token in vocabulary]
        if not known:
            raise ValueError(f"{path} has none of {', '.join(candidates)}: one is required to end documents")
        self.eod: int = vocabulary[known[0]]


class GPT2BPETokenizer(_BackendTokenizer):
    """Tokenizer of GPT-2: a `vocab.json` and a `merges.txt`.

    <|endoftext|> is the end-of-document token, also where a text contains it.
    """

    def __init__(self, vocab_file: Path | str, merge_file: Path | str) -> None:
        super().__init__()
        vocab_path, merge_path = _model_file(vocab_file), _model_file(merge_file)
        vocabulary = json_object(vocab_path)
        if not all(type(token) is int and token >= 0 for token in vocabulary.values()):
            raise ValueError(f"{vocab_path} is not a vocabulary: required an id, 0 or more, of each token")
        models, end = self._package.models, _END_OF_DOCUMENT[0]
        alphabet = self._package.pre_tokenizers.ByteLevel.alphabet()
        if lacking := {*alphabet, end} - vocabulary.keys():
            raise ValueError(
                f"{vocab_path} lacks {len(lacking)} of {end} and the 256 bytes, such as {min(lacking)!r}"
            )
        try:
            model = models.BPE.from_file(str(vocab_path), str(merge_path))
        except Exception as error:  # bare, as above
            raise ValueError(f"{merge_path} does not hold merges of {vocab_path}: {error}") from error
        self.backend = self._package.Tokenizer(model)
        self.backend.pre_tokenizer = self._package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend.decoder = self._package.decoders.ByteLevel()
        self.backend.add_special_tokens([self._package.AddedToken(end, special=True, normalized=False)])
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod: int = vocabulary[end]
        self.sha256 = digest_of_files("GPT2BPETokenizer", vocab_path, merge_path)


def digest_of_files(kind: str, *paths: Path) -> str:
    """Return the `sha256` of the tokenizer with these files: that of the file, or of the digests of several.

    The setting `split_special_tokens` of HuggingFaceTokenizer is included if it is set, because it changes
    ids.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If tokenizer_config.json is not a JSON object.
    """
    digests = [hashlib.sha256(path.read_bytes()) for path in paths]
    if kind == "HuggingFaceTokenizer" and _splits_special_tokens(_settings(paths[0])):
        digests.append(hashlib.sha256(b"split_special_tokens"))
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(one.digest() for one in digests))
    ).hexdigest()


def build_tokenizer(
    kind: str,
    model_path: Path | str | None = None,
    vocab_file: Path | str | None = None,
    merge_file: Path | str | None = None,
) -> Tokenizer:
    """Build a tokenizer of one of `TOKENIZER_KINDS`.

    Raises:
        ValueError: If the kind is unknown, a path is missing or superfluous, or a model cannot be read or has
            no end-of-document token.
        FileNotFoundError: If a file does not exist.
    """
    if kind not in TOKENIZER_KINDS:
        raise ValueError(f"tokenizer type {kind!r}: required one of {', '.join(TOKENIZER_KINDS)}")
    given = {"tokenizer model": model_path, "vocab_file": vocab_file, "merge_file": merge_file}
    build, needed = _BUILDERS[kind]
    for name, path in given.items():
        if name in needed and path is None:
            raise ValueError(f"{name}: required for {kind}")
        if name not in needed and path is not None:
            takes = f"takes {' and '.join(needed)}" if needed else "takes none"
            raise ValueError(f"{name} {path}: {kind} {takes}")
    return build(*(given[name] for name in needed))


_BUILDERS: dict[str, tuple[Callable[..., Tokenizer], tuple[str, ...]]] = {
    "SentencePieceTokenizer": (SentencePieceTokenizer, ("tokenizer model",)),
    "HuggingFaceTokenizer": (HuggingFaceTokenizer, ("tokenizer model",)),
    "GPT2BPETokenizer": (GPT2BPETokenizer, ("vocab_file", "merge_file")),
    "ByteTokenizer": (ByteTokenizer, ()),
}


def _model_file(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer file {path}: there is no such file")
    return path


def _settings(model_path: Path) -> dict[str, Any]:
    path = model_path.with_name("tokenizer_config.json")
    return json_object(path) if path.is_file() else {}


def _splits_special_tokens(settings: dict[str, Any]) -> bool:
    return settings.get("split_special_tokens") is True


def json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError if the file has other content, OSError if it cannot be read."""
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object: {content!r:.40}")
    return content


def _configured_eos(settings: dict[str, Any]) -> list[str]:
    token = settings.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return [token] if isinstance(token, str) else []
