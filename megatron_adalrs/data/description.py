"""`PREFIX.json`, the description of an indexed dataset: tokenizer, vocabulary and size."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_adalrs.data.tokenizer import DataTokenizer, Tokenizer, tokenizer_paths
from megatron_adalrs.utils.atomic_files import atomic_write


@dataclass(frozen=True)
class Description:
    """Content of `PREFIX.json`."""

    tokenizer_type: str
    tokenizer_sha256: str
    vocab_size: int
    eod: int
    append_eod: bool
    dtype: str
    documents: int
    tokens: int
    tokenizer_model: str | None = None
    """Path of the tokenizer's file when the data was encoded."""
    vocab_file: str | None = None
    merge_file: str | None = None

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode() + b"\n"


def description_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.json")


def read_description(prefix: Path | str) -> Description | None:
    """Read the description of a dataset, or return None if there is none.

    Raises:
        ValueError: If the file exists but is not a description of a dataset.
    """
    path = description_path(prefix)
    if not path.is_file():
        return None
    try:
        return Description(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not describe an indexed dataset: {error}") from error


def recorded_tokenizer(prefix: Path | str, note: Description) -> DataTokenizer:
    """Return the tokenizer that the description of a dataset records."""
    files = tuple(Path(named) if named else None for named in tokenizer_paths(note))
    is_known = any(files) or note.tokenizer_type == "ByteTokenizer"
    source = str(description_path(prefix))
    return DataTokenizer(note.tokenizer_type, note.tokenizer_sha256, source, files if is_known else None)


def require_tokenizer(prefix: Path | str, note: Description, tokenizer: Tokenizer, named: str) -> None:
    """Raise ValueError if the dataset was encoded with a different tokenizer than this one.

    Args:
        prefix: Prefix of the dataset.
        note: Its description.
        tokenizer: The required tokenizer.
        named: Field and value that named the tokenizer.
    """
    if tokenizer.sha256 != note.tokenizer_sha256:
        raise ValueError(
            f"{named} (SHA-256 {tokenizer.sha256:.12}) is not the tokenizer of {prefix} "
            f"({note.tokenizer_type}, {note.tokenizer_sha256:.12}, says {description_path(prefix)})"
        )


def write_description(prefix: Path | str, description: Description) -> None:
    """Write the description of a dataset. Raises OSError if it cannot be written."""
    with atomic_write(description_path(prefix)) as stream:
        stream.write(description.to_json())
