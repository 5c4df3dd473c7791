"""Stale locks of DeepSpeed's compiled operators.

torch protects the folder of an operator by a file named `lock` and waits for its removal without a time limit
or a message. A process that is killed while it loads an operator leaves the file, and every later program
that loads the operator would hang.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from torch.utils.cpp_extension import get_default_build_root

PATIENCE = 120.0
"""Seconds after which a lock that no process of this host holds counts as abandoned.

Another host that shares the folder may be compiling, which takes about one minute.
"""
_POLL_SECONDS = 0.5


def remove_abandoned_locks(
    folder: Path | None = None, patience: float = PATIENCE, report: Callable[[str], None] = print
) -> None:
    """Remove abandoned locks, and wait until the remaining ones are held by processes of this host.

    Args:
        folder: torch's folder of compiled operators; None for the configured one.
        patience: seconds after which a lock that no process of this host holds is removed.
        report: called with a message for each lock that is removed or waited for.
    """
    folder = folder or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    reported: set[Path] = set()
    while waiting := [lock for lock in _locks(folder) if not _is_held(lock)]:
        for lock in waiting:
            age = _age(lock)
            if age is not None and age >= patience:
                lock.unlink(missing_ok=True)
                report(f"removed {lock}: a process that was killed left it {age:.0f} s ago")
            elif age is not None and lock not in reported:
                reported.add(lock)
                report(f"waiting up to {patience:g} s for {lock}: no process of this host holds it")
        time.sleep(_POLL_SECONDS)


def _locks(folder: Path) -> Iterator[Path]:
    """Yield locks in folders of operators, which torch groups by Python version in its default folder."""
    for pattern in ("*/lock", "*/*/lock"):
        yield from folder.glob(pattern)


def _is_held(lock: Path) -> bool:
    """Return whether a process of this host has the lock open, as torch does, or it no longer exists."""
    try:
        status = lock.stat()
    except FileNotFoundError:
        return True
    for process in psutil.process_iter():
        try:
            if any(_is_same(file.path, status) for file in process.open_files()):
                return True
        except (psutil.Error, OSError):  # the process has ended or belongs to another user
            continue
    return False


def _is_same(path: str, other: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), other)
    except OSError:
        return False


def _age(lock: Path) -> float | None:
    """Return the age of a lock in seconds; None if it no longer exists.

    The clock is that of the file system, which may differ from this host's.
    """
    try:
        with tempfile.TemporaryFile(dir=lock.parent) as now:
            return os.fstat(now.fileno()).st_mtime - lock.stat().st_mtime
    except FileNotFoundError:
        return None
