"""Sample indices on disk: built once, then memory-mapped by every rank and every later run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np

from megatron_adalrs.data.sample_index import SampleIndex
from megatron_adalrs.utils.atomic_files import atomic_write

_EDGE = 8 << 20
_ARRAYS = tuple(field.name for field in fields(SampleIndex))
logger = logging.getLogger(__name__)


def load_or_build(
    folder: Path, name: str, description: Mapping[str, object], build: Callable[[], SampleIndex]
) -> SampleIndex:
    """The index that `description` determines, from `folder` if it is there and whole, else from `build`.

    An index is `NAME-HASH.json` and one .npy an array; HASH is that of the description, which must therefore
    hold everything that the index depends on. The JSON comes last and records the description and a
    fingerprint of each array; whatever does not agree with it is rebuilt with a warning. Files appear whole,
    so that a build that is killed, or that runs in two processes at once, does no harm.

    Raises OSError if the folder cannot be written.
    """
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    stem = folder / f"{name}-{digest}"
    record = stem.with_name(f"{stem.name}.json")
    if record.exists():
        try:
            return _load(stem, record, description)
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            logger.warning("sample index %s is damaged (%s): it is built anew", record, error)
    try:
        _save(stem, record, description, build())
    except OSError as error:
        raise OSError(f"index cache {folder} cannot be written: {error}") from error
    return _load(stem, record, description)


def _array_path(stem: Path, array: str) -> Path:
    return stem.with_name(f"{stem.name}-{array}.npy")


def _save(stem: Path, record: Path, description: Mapping[str, object], index: SampleIndex) -> None:
    for array in _ARRAYS:
        with atomic_write(_array_path(stem, array)) as stream:
            np.save(stream, getattr(index, array))
    content = {
        "description": description,
        "fingerprints": {array: _fingerprint(_array_path(stem, array)) for array in _ARRAYS},
    }
    with atomic_write(record) as stream:
        stream.write(json.dumps(content, indent=2).encode() + b"\n")


def _load(stem: Path, record: Path, description: Mapping[str, object]) -> SampleIndex:
    content = json.loads(record.read_text(encoding="utf-8"))
    if content["description"] != description:
        raise ValueError(f"{record} describes another index")
    arrays = {}
    for array in _ARRAYS:
        path = _array_path(stem, array)
        if _fingerprint(path) != content["fingerprints"][array]:
            raise ValueError(f"{path} is not the file that was written")
        arrays[array] = np.asarray(np.load(path, mmap_mode="r"))
    return SampleIndex(**arrays)


def _fingerprint(path: Path) -> str:
    """Size, and hash of the first and last 8 MiB: complete for small files and cheap for large ones.

    It finds files that were cut short, mixed up or overwritten; it does not look for single flipped bits.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        digest.update(stream.read(_EDGE))
        stream.seek(max(stream.tell(), size - _EDGE))
        digest.update(stream.read(_EDGE))
    return digest.hexdigest()
