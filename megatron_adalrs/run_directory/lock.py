"""Lock of a run directory: one job at a time writes to a run.

The lock is a POSIX record lock (`fcntl.lockf`). The system releases it when the process ends, however it
ends, and network file systems pass it to other hosts. Some are mounted with locks that only their own host
sees, or without locks. For these, the holder also renews a counter in the file: a job on another host that
finds a holder's entry watches it, refuses to start if the counter changes, and takes over if it does not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from megatron_adalrs.run_directory.folders import missing_folders, remove_empty

LOCK_FILE = "lock"
RENEWAL_SECONDS = 3.0
WATCHED_SECONDS = 4 * RENEWAL_SECONDS
HELD = {errno.EACCES, errno.EAGAIN}
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


class RunLock:
    """Exclusive use of a run directory, until `release` or the end of the process.

    Args:
        run_dir: Run directory. It is created if needed, and removed by `release` if it is still empty.

    Raises:
        ValueError: Another process uses the run directory, or it cannot be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK_FILE
        self._created = missing_folders(run_dir)
        self._ended = threading.Event()
        self._renewed = 0
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = self._acquire()
        except OSError as error:
            remove_empty(self._created)
            raise ValueError(f"run_dir: cannot lock {self._path}: {error.strerror or error}") from None
        self._holder = {
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": os.getpid(),
            "job": next((os.environ[name] for name in JOB_VARIABLES if name in os.environ), None),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._renew()
        self._thread = threading.Thread(target=self._keep_renewing, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """End the use of the run directory. Later calls do nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._path.unlink()
        os.close(self._file)
        remove_empty(self._created)

    def _acquire(self) -> int:
        """Open and lock the file, and return its descriptor."""
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                is_locked = _lock(file, self._path)
                if not is_locked or _is_same_file(file, self._path):
                    self._require_abandoned(file, is_locked)
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # its holder has released and removed it meanwhile

    def _require_abandoned(self, file: int, is_locked: bool) -> None:
        """Check that no other process renews the entry in the file.

        Args:
            is_locked: Whether this process has the lock, which excludes holders on this host.
        """
        held = _read(file)
        if held is None or (is_locked and held.get("boot") == _boot_id()):
            return
        deadline = time.monotonic() + WATCHED_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.25)
            if (now := _read(file)) is not None and now != held:
                raise ValueError(_refusal(self._path, now))

    def _renew(self) -> None:
        self._renewed += 1
        content = json.dumps(self._holder | {"renewed": self._renewed}).encode()
        with contextlib.suppress(OSError):  # a full disk: the lock itself remains
            os.pwrite(self._file, content + b"\n", 0)
            os.ftruncate(self._file, len(content) + 1)

    def _keep_renewing(self) -> None:
        while not self._ended.wait(RENEWAL_SECONDS):
            self._renew()


def _lock(file: int, path: Path) -> bool:
    """Lock an open file.

    Returns:
        False if the file system has no locks.

    Raises:
        ValueError: Another process has locked it.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise ValueError(_refusal(path, _read(file))) from None
        return False
    return True


def _refusal(path: Path, holder: dict[str, Any] | None) -> str:
    holder = holder or {}
    job = f" (job {holder['job']})" if holder.get("job") else ""
    who = (
        f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"
        if {"pid", "host", "since"} <= holder.keys()
        else "another process"
    )
    return (
        f"run_dir: {path.parent} is in use by {who}: wait until it has ended, or choose another run directory"
    )


def _read(file: int) -> dict[str, Any] | None:
    """Return the entry in a lock file; None if there is none or it is incomplete."""
    try:
        content = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _is_same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _boot_id() -> str:
    """Return a name of this host that changes when it boots."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
