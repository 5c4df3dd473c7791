"""Being asked to stop: signals, and the disappearance of the command that started the run."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import psutil

SECONDS_BETWEEN_LOOKS = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """Remembers SIGTERM, SIGINT and SIGUSR1 until the step is over, so that the run can save before it ends.

    SIGUSR1 is what Slurm's `--signal` sends ahead of the end of a job's time.

    A second SIGINT ends the process at once. A second SIGTERM does not: when a signal goes to the whole
    process group, as Ctrl-C and schedulers send it, DeepSpeed's launcher passes it on to ranks that have had
    it already.

    The `deepspeed` command of one node passes no SIGTERM on. It just ends, and its ranks would train on
    unattended: they stop when they see that it is gone.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._runner = _runner_pid()
        self._looked_at = 0.0

    @property
    def received(self) -> bool:
        """Whether to stop after this step."""
        if (
            not self._signalled
            and self._runner
            and time.monotonic() - self._looked_at > SECONDS_BETWEEN_LOOKS
        ):
            self._looked_at = time.monotonic()
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
    """The `deepspeed` command, if it is what started this rank: the parent of the launcher that is our
    parent."""
    try:
        launcher = psutil.Process(os.getppid())
        if "deepspeed.launcher.launch" not in launcher.cmdline():
            return None
        runner = launcher.parent()
        return runner.pid if runner and any("deepspeed" in word for word in runner.cmdline()) else None
    except psutil.Error:
        return None
