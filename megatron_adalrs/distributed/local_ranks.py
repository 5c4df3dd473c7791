"""Processes on this host that form one job, for measurements, fault injection and tests.

Each process has the environment that a launcher would give a rank, and one thread. On CPUs the processes are
forked from a server that has already imported torch and DeepSpeed.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

THREADS_PER_RANK = 1
PRELOADED_MODULES = [
    "megatron_adalrs.training.build",
    # DeepSpeed imports this module, and torch's compiler with it, for the first ZeRO optimizer.
    "deepspeed.runtime.zero.muon.muon_optimizer",
]
"""Modules that take seconds to import. The fork server imports them once for all ranks."""


class RankFailure(RuntimeError):
    """A rank raised an exception, exited or did not answer in time."""


class LocalRanks:
    """Ranks that are connected to this process by a pipe each and wait for messages.

    Args:
        world_size: Number of ranks.
        serve: Module-level function that each rank calls with its end of the pipe and `arguments`. It
            answers every message, and returns when `recv` raises `EOFError`.
        accelerator: DeepSpeed's name of the device type. Default: see `default_accelerator`.
    """

    def __init__(
        self, world_size: int, serve: Callable[..., None], *arguments: Any, accelerator: str | None = None
    ) -> None:
        port = free_port()
        context = start_method(accelerator or default_accelerator())
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = start_rank(rank, world_size, port, serve, theirs, *arguments, accelerator=accelerator)
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def send(self, message: Any) -> None:
        """Send a message to every rank."""
        for pipe in self._pipes:
            pipe.send(message)

    def answers(self, timeout: float | None = None) -> Iterator[tuple[int, Any]]:
        """Yield the rank and its answer to the last message, for every rank, as the answers arrive.

        Args:
            timeout: Seconds to wait for all of them. Default: no limit.

        Raises:
            RankFailure: A rank has exited, or did not answer in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        pending = dict(enumerate(self._pipes))
        while pending:
            ready = wait(
                pending.values(), None if deadline is None else max(0.0, deadline - time.monotonic())
            )
            if not ready:
                raise RankFailure(f"ranks {sorted(pending)} did not answer within {timeout:g} s")
            for rank in [rank for rank, pipe in pending.items() if pipe in ready]:
                try:
                    answer = pending.pop(rank).recv()
                except (EOFError, ConnectionError) as error:
                    raise RankFailure(f"rank {rank} exited before it answered") from error
                yield rank, answer

    def receive(self) -> list[Any]:
        """Wait for the answers of all ranks and return them in rank order; see `answers`."""
        received = dict(self.answers())
        return [received[rank] for rank in sorted(received)]

    def ask(self, message: Any) -> list[Any]:
        """Send a message to every rank and return the answers in rank order."""
        self.send(message)
        return self.receive()

    def close(self, timeout: float = 10.0) -> None:
        """Close the pipes, which makes the ranks return, and kill those that have not within `timeout`."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + timeout
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Kill all ranks."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


def start_rank(
    rank: int,
    world_size: int,
    port: int,
    target: Callable[..., int | None],
    *arguments: Any,
    accelerator: str | None = None,
) -> BaseProcess:
    """Start one rank of a job whose ranks are all on this host.

    Args:
        rank: Rank of the process.
        world_size: Number of ranks.
        port: Free port at which the first rank serves the store of the process group.
        target: Module-level function that the process calls. Its result is the exit code; None stands for 0.
        arguments: Arguments of `target`.
        accelerator: DeepSpeed's name of the device type. Default: see `default_accelerator`.
    """
    accelerator = accelerator or default_accelerator()
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(THREADS_PER_RANK),
        "DS_ACCELERATOR": accelerator,
    }
    process = start_method(accelerator).Process(
        target=_run_rank, args=(environment, target, arguments), daemon=True
    )
    process.start()
    return process


def start_method(accelerator: str) -> ForkServerContext | SpawnContext:
    """Return how ranks are started: forked on CPUs, spawned where the accelerator forbids forks."""
    if accelerator != "cpu":
        return multiprocessing.get_context("spawn")
    os.environ["DS_ACCELERATOR"] = accelerator  # read by the fork server, which imports DeepSpeed
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED_MODULES)
    return context


def default_accelerator() -> str:
    """Return the device type of DS_ACCELERATOR or, if it is not set, of this host."""
    import torch

    return os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")


def free_port() -> int:
    """Return a port of the loopback interface that no process listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _run_rank(
    environment: dict[str, str], target: Callable[..., int | None], arguments: tuple[Any, ...]
) -> NoReturn:
    os.environ |= environment
    import torch

    torch.set_num_threads(THREADS_PER_RANK)
    code = target(*arguments)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)  # finalizing an interpreter that has imported torch takes a second
