"""Cache of sample indices on disk: built once, then memory-mapped by every rank and every later run."""

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
    """Load the index with this description from `folder`, or build and store it.

    An index consists of `NAME-HASH.json` and one .npy file per array. HASH is the hash of the description,
    which must therefore contain everything that the index depends on. The JSON file is written last and has
    the description and a fingerprint of each array; an index that does not match it is rebuilt with a
    warning. Files are written atomically, so that a killed build, or builds in several processes, do no harm.

    Raises:
        OSError: If the folder cannot be written.
    """
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    stem = folder / f"{name}-{digest}"
    record = stem.with_name(f"{stem.name}.json")
    if record.exists():
        try:
            return _load(stem, record, description)
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            logger.warning("sample index %s is damaged (%s): rebuilding it", record, error)
    try:
        _save(stem, record, description, build())
    except OSError as error:
        raise OSError(
            f"data_cache_path: index cache {folder} cannot be written: {error}; "
            "give --data-cache-path a folder that can be"
        ) from error
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
    """Return a hash of the size and of the first and last 8 MiB, which is cheap for large files.

    It detects truncated, exchanged or overwritten files, but not single flipped bits in large ones.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        digest.update(stream.read(_EDGE))
        stream.seek(max(stream.tell(), size - _EDGE))
        digest.update(stream.read(_EDGE))
    return digest.hexdigest()
