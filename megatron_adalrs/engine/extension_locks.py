"""Locks that a process killed while it loaded one of DeepSpeed's compiled operators has left behind.

torch guards the folder of an operator by a file named `lock`, and waits for its removal without an end or a
word. A process that is killed in between leaves it there, and every later run, of whatever program, would
hang at its start.
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
"""Seconds after which a lock that no process of this host holds counts as abandoned: another host, which
shares the folder, may be compiling, which takes about one minute."""
_POLL_SECONDS = 0.5


def remove_abandoned_locks(
    folder: Path | None = None, patience: float = PATIENCE, tell: Callable[[str], None] = print
) -> None:
    """Wait until no operator is locked but by a living process of this host; remove what nobody will remove.

    Args:
        folder: torch's folder of compiled operators; None: where it is.
        tell: is told what is removed or waited for.
    """
    folder = folder or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    told: set[Path] = set()
    while waiting := [lock for lock in _locks(folder) if not _is_held(lock)]:
        for lock in waiting:
            age = _age(lock)
            if age is not None and age >= patience:
                lock.unlink(missing_ok=True)
                tell(f"removed {lock}: a process that was killed left it {age:.0f} s ago")
            elif age is not None and lock not in told:
                told.add(lock)
                tell(f"waiting up to {patience:g} s for {lock}: no process of this host holds it")
        time.sleep(_POLL_SECONDS)


def _locks(folder: Path) -> Iterator[Path]:
    """In the folders of operators, which torch keeps apart by versions of Python unless told where to keep
    them."""
    for pattern in ("*/lock", "*/*/lock"):
        yield from folder.glob(pattern)


def _is_held(lock: Path) -> bool:
    """Whether a process of this host has it open, as torch does while it holds it; or whether it is gone."""
    try:
        mine = lock.stat()
    except FileNotFoundError:
        return True
    for process in psutil.process_iter():
        try:
            if any(_is_same(file.path, mine) for file in process.open_files()):
                return True
        except (psutil.Error, OSError):  # ended meanwhile, or another user's
            continue
    return False


def _is_same(path: str, other: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), other)
    except OSError:
        return False


def _age(lock: Path) -> float | None:
    """Seconds since it was made, by the clock of its file system, which need not be this host's; None: it is
    gone."""
    try:
        with tempfile.TemporaryFile(dir=lock.parent) as now:
            return os.fstat(now.fileno()).st_mtime - lock.stat().st_mtime
    except FileNotFoundError:
        return None
