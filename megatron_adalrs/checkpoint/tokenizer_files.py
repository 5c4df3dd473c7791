"""The files of the tokenizer that goes with a model's weights, and whether they are those of a run's data."""

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
    companions_in,
    digests_of,
    made_from,
    tokenizer_in,
)
from megatron_adalrs.huggingface.config_json import Shape, is_model

# Of words alone: forms of one tokenizer may differ in what they do with special tokens and runs of blanks.
_SENTENCE = "The quick brown fox jumps over the lazy dog, and 42 is not 3.14 (ça va?)."


@dataclass(frozen=True)
class Tokenizer:
    """What goes with a model's weights where they are exported."""

    files: Mapping[str, Path]
    """By the names that Hugging Face gives them; with them, settings of generation."""
    ids: Mapping[str, Any]
    """What is known of bos_token_id, eos_token_id, pad_token_id."""
    note: str | None = None
    """What a person should know of it."""
    kind: str | None = None
    """Of `TOKENIZER_KINDS`; None: the files came with a model."""


def tokenizer_of_run(saved: dict[str, Any], data: DataConfig, vocab_size: int) -> Tokenizer:
    """The files of the tokenizer that made a run's data, as far as they can be found, its token ids, and what
    to tell.

    Args:
        saved: the run's configuration.
    """
    corpus, first_description = _making_of(data)
    eod = first_description.eod if first_description else data.eod_token_id
    ids = {"eos_token_id": eod} if eod is not None and eod < vocab_size else {}
    kind = data.tokenizer_type or (first_description.tokenizer_type if first_description else None)
    if kind == "ByteTokenizer":
        return Tokenizer({}, ids, kind=kind)
    told = []
    for place, found, before in _candidates(data, kind, first_description, saved.get("finetune_from")):
        digests = digests_of(found)
        if not digests:
            told.append(f"there is no tokenizer in {place}, none is copied")
        elif first_description is not None and first_description.tokenizer_sha256 not in digests.values():
            told.append(f"{_first_of(found, digests)} is not what made {corpus}, no tokenizer is copied")
        else:
            return Tokenizer(found, before | ids, f"{_first_of(found, digests)} is copied", kind)
    return Tokenizer({}, ids, told[0] if told else "the run names no tokenizer, none is copied")


def _candidates(
    data: DataConfig, kind: str | None, first_description: Description | None, origin: str | None
) -> Iterator[tuple[str, Mapping[str, Path], dict[str, Any]]]:
    """Where a run's tokenizer may be: a place, the files there, and token ids."""
    if place := data.tokenizer_model or data.vocab_file:
        yield str(place), _files_named(data, kind), {}
    elif origin is not None:
        yield origin, *_tokenizer_before(Path(origin))
    # Absolute, and compared with the data: good where a run's own path was relative to a folder that is
    # another now.
    if first_description and (noted := first_description.tokenizer_model or first_description.vocab_file):
        yield noted, _files_named(first_description, first_description.tokenizer_type), {}


def require_matching_tokenizer(
    files: Mapping[str, Path], model: ModelConfig, tokenizer: DataTokenizer, flag: str
) -> None:
    """Check that the files beside a model are, as far as anything tells, of the tokenizer that made a run's
    data.

    What is in other words the same, as a tokenizer.json that was saved anew, is told by the ids of a
    sentence.

    Args:
        model: which the files lie beside.

    Raises:
        ValueError: they are of another one; the message begins with `flag` and names both files.
        OSError: one cannot be read.
    """
    digests = digests_of(files)
    if not digests or tokenizer.sha256 in digests.values():
        return
    asked = _says_the_same(files, model, tokenizer)
    # Digests alone say nothing of a tokenizer that has a form of another kind.
    if not (tokenizer.kind not in digests and not made_from(files) if asked is None else asked):
        name = "; if it is, give --tokenizer-type and its files" if asked is None else ""
        raise ValueError(
            f"{flag}: {_first_of(files, digests)} is not the tokenizer of this run's data, "
            f"{tokenizer.source} "
            f"({tokenizer.kind}, SHA-256 {tokenizer.sha256:.12}): required the same{name}"
        )


def _says_the_same(files: Mapping[str, Path], model: ModelConfig, tokenizer: DataTokenizer) -> bool | None:
    """Whether two tokenizers have the same ids for a sentence; None: one of them cannot be asked."""
    try:
        ours, theirs = tokenizer.build(), tokenizer_in(files, model)
    except (ValueError, OSError):  # a package is not installed, or nothing tells theirs what ends a document
        return None
    if ours is None or theirs is None or ours.sha256 != tokenizer.sha256:  # a file that was changed since
        return None
    return ours.encode(_SENTENCE) == theirs.encode(_SENTENCE)


def _first_of(files: Mapping[str, Path], digests: Mapping[str, str]) -> Path:
    """The file by which a person knows the tokenizer."""
    return next(files[names[0]] for kind, names in FORMS.items() if kind in digests and names[0] in files)


def _making_of(data: DataConfig) -> tuple[str, Description] | tuple[None, None]:
    """A corpus that has a note of how it was made, and the note. All corpora of a run have the same
    tokenizer."""
    try:
        noted = ((corpus.prefix, read_description(corpus.prefix)) for corpus in data.corpora)
        return next(((prefix, note) for prefix, note in noted if note), (None, None))
    except (ValueError, OSError):  # whoever exports need not have the data any more
        return None, None


def _files_named(by: DataConfig | Description, kind: str | None) -> dict[str, Path]:
    """The tokenizer's files that a run or a note names, by the names that Hugging Face gives them."""
    if by.vocab_file and by.merge_file:
        return {VOCAB: Path(by.vocab_file), MERGES: Path(by.merge_file)}
    named = Path(by.tokenizer_model or "")
    if kind == "SentencePieceTokenizer":
        return {SENTENCEPIECE_MODEL: named}
    if named.is_dir():
        return companions_in(named)
    # What is beside a file of another name may belong to another.
    return companions_in(named.parent) if named.name == TOKENIZER_JSON else {TOKENIZER_JSON: named}


def _tokenizer_before(origin: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """Files and token ids of the model that a run began with, if these came with it."""
    try:
        if is_model(origin):
            return companions_in(origin), Shape(origin).token_ids
        return companions_in(origin / TOKENIZER), read_state(origin).get("token_ids", {})
    except ValueError:  # it need not be there any more
        return {}, {}
