"""Find the tokenizer of a model, and check that it is the tokenizer of a run's data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_adalrs.checkpoint.load import read_state
from megatron_adalrs.checkpoint.manifest import TOKENIZER
from megatron_adalrs.config import DataConfig, ModelConfig
from megatron_adalrs.data.description import Description, read_description
from megatron_adalrs.data.tokenizer import DataTokenizer
from megatron_adalrs.huggingface.companion_files import (
    FORMS,
    MERGES,
    SENTENCEPIECE_MODEL,
    TOKENIZER_JSON,
    VOCAB,
    find_companion_files,
    made_from,
    tokenizer_digests,
    tokenizer_in,
)
from megatron_adalrs.huggingface.config_json import Shape, is_model

# Plain words: forms of one tokenizer may treat special tokens and repeated spaces differently.
_SENTENCE = "The quick brown fox jumps over the lazy dog, and 42 is not 3.14 (ça va?)."


@dataclass(frozen=True)
class Tokenizer:
    """Tokenizer that is exported with a model."""

    files: Mapping[str, Path]
    """Files of the tokenizer and generation settings, by their names in Hugging Face folders."""
    ids: Mapping[str, Any]
    """bos_token_id, eos_token_id and pad_token_id, as far as they are known."""
    note: str | None = None
    """Message for the user, if there is one."""
    kind: str | None = None
    """Kind of the tokenizer, one of `TOKENIZER_KINDS`; None if the files came with a model."""


def tokenizer_of_run(saved: dict[str, Any], data: DataConfig, vocab_size: int) -> Tokenizer:
    """Find the tokenizer that made a run's data.

    Args:
        saved: Configuration of the run.
        data: Its data settings.
        vocab_size: Size of its vocabulary without padding.
    """
    corpus, first_description = _making_of(data)
    eod = first_description.eod if first_description else data.eod_token_id
    ids = {"eos_token_id": eod} if eod is not None and eod < vocab_size else {}
    kind = data.tokenizer_type or (first_description.tokenizer_type if first_description else None)
    if kind == "ByteTokenizer":
        return Tokenizer({}, ids, kind=kind)
    notes = []
    for place, found, before in _candidates(data, kind, first_description, saved.get("finetune_from")):
        digests = tokenizer_digests(found)
        if not digests:
            notes.append(f"there is no tokenizer in {place}, none is copied")
        elif first_description is not None and first_description.tokenizer_sha256 not in digests.values():
            notes.append(f"{_first_of(found, digests)} did not make {corpus}, no tokenizer is copied")
        else:
            return Tokenizer(found, before | ids, f"{_first_of(found, digests)} is copied", kind)
    return Tokenizer({}, ids, notes[0] if notes else "the run names no tokenizer, none is copied")


def _candidates(
    data: DataConfig, kind: str | None, first_description: Description | None, origin: str | None
) -> Iterator[tuple[str, Mapping[str, Path], dict[str, Any]]]:
    """Yield the places where a run's tokenizer may be, with the files and token ids there."""
    if place := data.tokenizer_model or data.vocab_file:
        yield str(place), _files_named(data, kind), {}
    elif origin is not None:
        yield origin, *_tokenizer_before(Path(origin))
    # The description of the data has an absolute path and a digest, for runs whose own path was relative to
    # another working directory.
    if first_description and (noted := first_description.tokenizer_model or first_description.vocab_file):
        yield noted, _files_named(first_description, first_description.tokenizer_type), {}


def require_matching_tokenizer(
    files: Mapping[str, Path], model: ModelConfig, tokenizer: DataTokenizer, flag: str
) -> None:
    """Check that the files beside a model are those of the tokenizer that made a run's data.

    Tokenizers with different digests, such as a tokenizer.json that was saved again, are compared by the ids
    of a sentence. Files that cannot be compared are accepted.

    Args:
        files: Companion files of the model.
        model: Configuration of the model.
        tokenizer: Tokenizer of the data.
        flag: Beginning of the message.

    Raises:
        ValueError: They are those of another tokenizer; the message names both files.
        OSError: A file cannot be read.
    """
    digests = tokenizer_digests(files)
    if not digests or tokenizer.sha256 in digests.values():
        return
    same_ids = _has_same_ids(files, model, tokenizer)
    # Digests of tokenizers of different kinds cannot be compared.
    unknown = tokenizer.kind not in digests and not made_from(files)
    if not (unknown if same_ids is None else same_ids):
        hint = "; if it is, give --tokenizer-type and its files" if same_ids is None else ""
        raise ValueError(
            f"{flag}: {_first_of(files, digests)} is not the tokenizer of this run's data, "
            f"{tokenizer.source} ({tokenizer.kind}, SHA-256 {tokenizer.sha256:.12}): they must be the "
            f"same{hint}"
        )


def _has_same_ids(files: Mapping[str, Path], model: ModelConfig, tokenizer: DataTokenizer) -> bool | None:
    """Return whether two tokenizers encode a sentence equally, or None if one of them cannot be built."""
    try:
        ours, theirs = tokenizer.build(), tokenizer_in(files, model)
    except (ValueError, OSError):  # a package or the end-of-document token is missing
        return None
    if ours is None or theirs is None or ours.sha256 != tokenizer.sha256:  # the file has changed
        return None
    return ours.encode(_SENTENCE) == theirs.encode(_SENTENCE)


def _first_of(files: Mapping[str, Path], digests: Mapping[str, str]) -> Path:
    """Return the file that identifies the tokenizer in messages."""
    return next(files[names[0]] for kind, names in FORMS.items() if kind in digests and names[0] in files)


def _making_of(data: DataConfig) -> tuple[str, Description] | tuple[None, None]:
    """Return a corpus of the run that has a description, and the description.

    All corpora of a run have the same tokenizer.
    """
    try:
        noted = ((corpus.prefix, read_description(corpus.prefix)) for corpus in data.corpora)
        return next(((prefix, note) for prefix, note in noted if note), (None, None))
    except (ValueError, OSError):  # the data need not exist when a model is exported
        return None, None


def _files_named(by: DataConfig | Description, kind: str | None) -> dict[str, Path]:
    """Return the tokenizer files that a run or a description names, by their Hugging Face names."""
    if by.vocab_file and by.merge_file:
        return {VOCAB: Path(by.vocab_file), MERGES: Path(by.merge_file)}
    named = Path(by.tokenizer_model or "")
    if kind == "SentencePieceTokenizer":
        return {SENTENCEPIECE_MODEL: named}
    if named.is_dir():
        return find_companion_files(named)
    # Files beside a file of another name may belong to another tokenizer.
    return find_companion_files(named.parent) if named.name == TOKENIZER_JSON else {TOKENIZER_JSON: named}


def _tokenizer_before(origin: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """Return tokenizer files and token ids of the model that a run was initialized with."""
    try:
        if is_model(origin):
            return find_companion_files(origin), Shape(origin).token_ids
        return find_companion_files(origin / TOKENIZER), read_state(origin).get("token_ids", {})
    except ValueError:  # it may have been removed
        return {}, {}
