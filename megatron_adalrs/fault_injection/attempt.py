"""One attempt of a run: two ranks, from their start until they exit or are killed."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

from megatron_adalrs.distributed.local_ranks import free_port, start_rank

RANKS = 2

Program = Callable[[list[str]], int]
"""The pretraining program: takes the command line, returns the exit code."""


class Attempt:
    """Two ranks of the pretraining program.

    The ranks are forked from a process that has already imported torch and DeepSpeed.

    Args:
        program: Function that each rank calls with `arguments`; it must be importable by name.
        arguments: Command line.
        output: File to which the ranks append their standard output and error.
        largest_file: Size in bytes beyond which files cannot grow, as on a full disk. Default: no limit.
    """

    def __init__(
        self, program: Program, arguments: list[str], output: Path, largest_file: int | None = None
    ) -> None:
        self.began = time.monotonic()
        port = free_port()
        call = (program, arguments, str(output), largest_file)
        self._ranks = [
            start_rank(rank, RANKS, port, _run_program, *call, accelerator="cpu") for rank in range(RANKS)
        ]

    @property
    def age(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    @property
    def is_over(self) -> bool:
        """Whether both ranks have ended."""
        return all(process.exitcode is not None for process in self._ranks)

    @property
    def exit_codes(self) -> list[int | None]:
        return [process.exitcode for process in self._ranks]

    @property
    def pid_of_first(self) -> int | None:
        """Process id of the first rank."""
        return self._ranks[0].pid

    def kill(self, rank: int) -> None:
        """Send SIGKILL to a rank."""
        self._ranks[rank].kill()

    def exit_of_first(self, seconds: float) -> int | None:
        """Wait up to `seconds` for the first rank to exit, and return its exit code."""
        self._ranks[0].join(seconds)
        return self._ranks[0].exitcode

    def end(self, seconds: float = 0.0) -> bool:
        """Wait up to `seconds` for the ranks to exit, then kill those that are left.

        Returns:
            True if all ranks exited by themselves.
        """
        deadline = time.monotonic() + seconds
        while not self.is_over and (left := deadline - time.monotonic()) > 0:
            wait([process.sentinel for process in self._ranks if process.exitcode is None], left)
        had_ended = self.is_over
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.join()
        return had_ended


def _run_program(program: Program, arguments: list[str], output: str, largest_file: int | None) -> int:
    """Call the program as one rank, with its standard output and error appended to a file."""
    if largest_file is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    return program(arguments)
