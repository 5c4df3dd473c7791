"""Vocabulary of a run: its size, the tokenizer of the data, and the end-of-document token."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_adalrs.config import Config, DataConfig
from megatron_adalrs.data.blend import check_vocabularies
from megatron_adalrs.data.description import (
    Description,
    description_path,
    read_description,
    recorded_tokenizer,
    require_tokenizer,
)
from megatron_adalrs.data.pair_files import require_pairs
from megatron_adalrs.data.tokenizer import DataTokenizer, Tokenizer, build_tokenizer, tokenizer_paths


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary of the tokenizer that the flags name, else of the one that is recorded with the data."""

    size: int
    """Size before padding."""
    tokenizer: DataTokenizer | None
    """Tokenizer of the data; None if it is not known."""
    eod: int | None
    """End-of-document token of the tokenizer or else of the description; None if it is not known."""
    made: tuple[str, Description] | None
    """The first corpus with a description, and that description."""


def resolve_vocabulary(config: Config) -> Vocabulary:
    """Return the vocabulary of a run, checked against the tokens of the data.

    Raises:
        ValueError, OSError: As `known_vocabulary` does, and if the data has tokens beyond the vocabulary or
            cannot be read, or a file of it is missing.
    """
    require_pairs(config.data)
    vocabulary = known_vocabulary(config)
    check_vocabularies(config.data, vocabulary.size)
    return vocabulary


def known_vocabulary(config: Config) -> Vocabulary:
    """Return the vocabulary of a run without reading the tokens of the data.

    Raises:
        ValueError: If the size is not known, the tokenizer needs more tokens than --vocab-size allows, or a
            corpus was encoded with a different tokenizer than the flags name or than the other corpora.
        FileNotFoundError: If the tokenizer's file does not exist.
    """
    data = config.data
    made = first_description(data)
    tokenizer = build_tokenizer(data.tokenizer_type, *tokenizer_paths(data)) if data.tokenizer_type else None
    if tokenizer and made:
        field = "vocab_file" if data.vocab_file else "tokenizer_model"
        require_tokenizer(*made, tokenizer, f"{field}: {getattr(data, field) or data.tokenizer_type}")
    known = tokenizer or (made[1] if made else None)
    return Vocabulary(
        size=_size(config.model.vocab_size, tokenizer, made),
        tokenizer=_of_data(data, tokenizer, made),
        eod=known.eod if known else None,
        made=made,
    )


def _of_data(
    data: DataConfig, tokenizer: Tokenizer | None, made: tuple[str, Description] | None
) -> DataTokenizer | None:
    if tokenizer and data.tokenizer_type:
        named = next(filter(None, tokenizer_paths(data)), data.tokenizer_type)
        return DataTokenizer(data.tokenizer_type, tokenizer.sha256, str(named), tokenizer_paths(data))
    if made is None:
        return None
    return recorded_tokenizer(*made)


def _size(asked: int | None, tokenizer: Tokenizer | None, made: tuple[str, Description] | None) -> int:
    """Return the vocabulary size of the flag, the tokenizer, or the description of the data."""
    if tokenizer:
        known, source = tokenizer.vocab_size, "the tokenizer"
    elif made:
        known, source = made[1].vocab_size, f"the tokenizer that made {made[0]}"
    else:
        known, source = asked or 0, "--vocab-size"
    if not known:
        raise ValueError("vocab_size: unknown; give --vocab-size, or --tokenizer-type and --tokenizer-model")
    if asked and known > asked:
        raise ValueError(f"vocab_size: {asked} is below the {known} tokens of {source}")
    return asked or known


def first_description(data: DataConfig) -> tuple[str, Description] | None:
    """Return the first corpus with a description and that description, or None if there is none.

    Raises:
        ValueError: If other corpora were encoded with another tokenizer, or a description cannot be read.
    """
    noted = {c.prefix: note for c in data.corpora if (note := read_description(c.prefix))}
    first = next(iter(noted.items()), None)
    for prefix, note in noted.items():
        if first and note.tokenizer_sha256 != first[1].tokenizer_sha256:
            raise ValueError(
                f"{description_path(prefix)} names a different tokenizer ({note.tokenizer_type}, SHA-256 "
                f"{note.tokenizer_sha256:.12}) than {description_path(first[0])} ({first[1].tokenizer_type}, "
                f"{first[1].tokenizer_sha256:.12}): required the same for all corpora"
            )
    return first


def with_end_of_document(config: Config, vocabulary: Vocabulary) -> Config:
    """Return the configuration with its end-of-document token set, if masks, positions or the loss need it.

    Raises:
        ValueError: If the token is not known, contradicts the description of the data, or is beyond the
            vocabulary.
    """
    data, made = config.data, vocabulary.made
    if not data.marks_documents:
        return config
    flags = [
        name
        for name in ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
        if getattr(data, name)
    ]
    eod = data.eod_token_id
    if made and not made[1].append_eod:
        raise ValueError(
            f"{flags[0]}: {description_path(made[0])} says that no document has an end-of-document token"
        )
    if made and eod not in (None, made[1].eod):
        raise ValueError(
            f"eod_token_id: {eod} contradicts {description_path(made[0])}, which says {made[1].eod}"
        )
    if eod is None:
        eod = vocabulary.eod
    if eod is None:
        raise ValueError(
            f"{flags[0]}: the end-of-document token is unknown; give --eod-token-id, or --tokenizer-type and "
            "--tokenizer-model"
        )
    if eod >= vocabulary.size:
        raise ValueError(
            f"eod_token_id: {eod}: required 0 to {vocabulary.size - 1}, the vocabulary of {vocabulary.size}"
        )
    return config.model_copy(update={"data": data.model_copy(update={"eod_token_id": eod})})
