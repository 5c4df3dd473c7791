"""RunLock: one job at a time uses a run directory, and a dead job does not block it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from megatron_adalrs.run_directory import lock
from megatron_adalrs.run_directory.lock import LOCK_FILE, RunLock

HOLD = """
import sys, pathlib
from megatron_adalrs.run_directory.lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
lock.release()
"""


def holder(run: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout and process.stdout.readline() == "locked\n"
    return process


def test_a_second_job_is_refused_and_holder_named(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"is in use by process {process.pid} on .*, since 20"):
        RunLock(tmp_path / "run")
    process.communicate()
    assert not (tmp_path / "run").exists()  # nothing was written besides the lock
    RunLock(tmp_path / "run").release()


def test_a_killed_job_leaves_no_lock(tmp_path: Path) -> None:
    process = holder(tmp_path / "run")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    RunLock(tmp_path / "run").release()


def entry(run: Path, renewed: int, boot: str = "another host's") -> str:
    run.mkdir(exist_ok=True)
    values = {"host": "node7", "boot": boot, "pid": 1, "job": "815", "since": "then", "renewed": renewed}
    (run / LOCK_FILE).write_text(json.dumps(values))
    return boot


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WATCHED_SECONDS", 1.0)


@pytest.mark.usefixtures("quick")
def test_a_dead_host_leaves_no_lock(tmp_path: Path) -> None:
    entry(tmp_path / "run", 5)
    RunLock(tmp_path / "run").release()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("has_locks", [True, False])
def test_a_live_job_on_another_host_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool
) -> None:
    if not has_locks:
        monkeypatch.setattr(fcntl, "lockf", unsupported)
    entry(tmp_path / "run", 5)
    renewal = threading.Timer(0.3, entry, (tmp_path / "run", 6))
    renewal.start()
    with pytest.raises(ValueError, match=r"in use by process 1 on node7 \(job 815\), since then: wait"):
        RunLock(tmp_path / "run")
    renewal.join()


def unsupported(*_: object) -> None:
    raise OSError(38, os.strerror(38))


def test_release_keeps_a_directory_that_is_used(tmp_path: Path) -> None:
    held = RunLock(tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").touch()
    held.release()
    held.release()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
