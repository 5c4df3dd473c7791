"""Corpus of the sources of the running Python's standard library, which every machine has."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_adalrs.utils.atomic_files import atomic_write

_FOREIGN_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}
# Written by the build (paths, compiler flags) or the distribution, so different from machine to machine.
_LOCAL_PREFIXES = ("config-", "_sysconfig", "sitecustomize", "usercustomize")


def source_files(root: Path) -> list[Path]:
    """Return the library's own .py files under `root`, sorted by relative POSIX path.

    Symbolic links are left out.
    """
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _FOREIGN_FOLDERS and not _is_local(name)]
        found += [Path(folder, name) for name in files if name.endswith(".py") and not _is_local(name)]
    found = [path for path in found if not path.is_symlink()]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def records(root: Path, limit_bytes: float) -> Iterator[tuple[dict[str, str], int]]:
    """Yield the record and the size in bytes of each document, up to a total size."""
    total = 0
    for path in source_files(root):
        data = path.read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        if not data:
            continue
        total += len(data)
        if total > limit_bytes:
            return
        yield {"path": path.relative_to(root).as_posix(), "text": text}, len(data)


def collect(root: Path, output: Path, limit_bytes: float) -> tuple[int, int]:
    """Write the corpus and return its numbers of files and bytes. Raises ValueError if it is empty."""
    files = size = 0
    with atomic_write(output) as stream:
        for record, bytes_read in records(root, limit_bytes):
            stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            files, size = files + 1, size + bytes_read
        if not files:
            raise ValueError(
                f"standard library {root}: no source within {limit_bytes:.0f} bytes, required at least one"
            )
    return files, size


def _is_local(name: str) -> bool:
    return name.startswith(_LOCAL_PREFIXES)
