"""Requests to stop: signals, and the exit of the `deepspeed` command that started the run."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import psutil

SECONDS_BETWEEN_CHECKS = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """Records SIGTERM, SIGINT and SIGUSR1, so that the run can save a checkpoint after the current step.

    SIGUSR1 is the signal that Slurm can send before the time limit of a job (`--signal`).

    A second SIGINT ends the process immediately. A second SIGTERM does not: schedulers send a signal to the
    whole process group, and DeepSpeed's launcher forwards it to ranks that have already received it.

    On a single node the `deepspeed` command does not forward SIGTERM. It exits, and its ranks would continue
    unattended. They therefore check that it still exists.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._runner = _runner_pid()
        self._checked_at = 0.0

    @property
    def received(self) -> bool:
        """Whether to stop after this step."""
        if (
            not self._signalled
            and self._runner
            and time.monotonic() - self._checked_at > SECONDS_BETWEEN_CHECKS
        ):
            self._checked_at = time.monotonic()
            self._signalled = _runner_pid() != self._runner
        return self._signalled

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


def _runner_pid() -> int | None:
    """Return the process id of the `deepspeed` command that started this rank; None if there is none.

    The command is the parent of the launcher, which is the parent of this process.
    """
    try:
        launcher = psutil.Process(os.getppid())
        if "deepspeed.launcher.launch" not in launcher.cmdline():
            return None
        runner = launcher.parent()
        return runner.pid if runner and any("deepspeed" in word for word in runner.cmdline()) else None
    except psutil.Error:
        return None
