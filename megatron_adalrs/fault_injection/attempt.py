"""One attempt of a run: two ranks, from their start until they exit or are killed."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

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
    """

    def __init__(self, program: Program, arguments: list[str], output: Path) -> None:
        self.began = time.monotonic()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["megatron_adalrs.training.build", "deepspeed.runtime.zero.muon.muon_optimizer"]
        )
        self._ranks: list[Any] = []
        for rank in range(RANKS):
            process = context.Process(
                target=_run_rank, args=(program, rank, port, arguments, str(output)), daemon=True
            )
            process.start()
            self._ranks.append(process)

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

    def kill(self, rank: int) -> None:
        """Send SIGKILL to a rank."""
        self._ranks[rank].kill()

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


def _run_rank(program: Program, rank: int, port: int, arguments: list[str], output: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    import torch

    torch.set_num_threads(1)
    code = program(arguments)
    sys.stdout.flush()
    os._exit(code)  # finalizing an interpreter that has imported torch takes a second
