"""A process that was killed while it loaded an operator does not make later runs hang."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_adalrs.engine.extension_locks import remove_abandoned_locks

HOLDER = (
    "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True); "
    "time.sleep(60)"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "py311_cpu" / "operator").mkdir(parents=True)
    return tmp_path


def held_by_a_process(lock: Path) -> subprocess.Popen[str]:
    """Start a process that holds a lock as torch does: it creates the file and keeps it open."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_killed_process_lock_is_removed_when_old(folder: Path) -> None:
    lock = folder / "py311_cpu" / "operator" / "lock"
    messages: list[str] = []
    process = held_by_a_process(lock)
    process.kill()
    process.communicate()
    started = time.monotonic()
    remove_abandoned_locks(folder, 1.0, messages.append)
    assert not lock.exists() and 0.4 < time.monotonic() - started < 10
    assert messages[0].startswith(f"waiting up to 1 s for {lock}") and messages[-1].startswith(
        f"removed {lock}: a process"
    )


def test_an_old_lock_is_removed_at_once(folder: Path) -> None:
    lock = folder / "py311_cpu" / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 300, time.time() - 300))
    messages: list[str] = []
    remove_abandoned_locks(folder, 120.0, messages.append)
    assert not lock.exists() and len(messages) == 1 and "300 s ago" in messages[0]


def test_a_lock_of_a_live_process_is_kept(folder: Path) -> None:
    lock = folder / "py311_cpu" / "operator" / "lock"
    messages: list[str] = []
    process = held_by_a_process(lock)
    try:
        os.utime(lock, (1.0, 1.0))
        remove_abandoned_locks(folder, 1.0, messages.append)
        assert lock.exists() and messages == []
    finally:
        process.kill()
        process.communicate()


def test_waits_for_a_lock_of_another_host(folder: Path) -> None:
    """The processes of another host cannot be inspected, so its lock counts as live until it is old."""
    lock = folder / "py311_cpu" / "operator" / "lock"
    messages: list[str] = []
    lock.touch()
    threading.Timer(0.7, lock.unlink).start()
    remove_abandoned_locks(folder, 60.0, messages.append)
    assert not lock.exists() and len(messages) == 1


def test_a_missing_folder_is_no_error(tmp_path: Path) -> None:
    remove_abandoned_locks(tmp_path / "nowhere", 1.0, pytest.fail)
