"""Ranks of a measurement: processes that are started once and wait on a pipe, idle, until they are asked."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

THREADS = 1


class Cell:
    """The ranks of one mesh: they do nothing but what they are asked.

    Args:
        serve: a module-level function of a pipe and `arguments` that answers what comes through the pipe
            until it is closed. It finds itself in the environment of a rank.
    """

    def __init__(self, ranks: int, serve: Callable[..., None], *arguments: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = start_method()
        self._pipes, self._processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_enter, args=(rank, ranks, port, serve, theirs, arguments), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def ask(self, question: str) -> list[Any]:
        """Every rank's answer."""
        self.begin(question)
        return self.end()

    def begin(self, question: str) -> None:
        for pipe in self._pipes:
            pipe.send(question)

    def end(self) -> list[Any]:
        return [pipe.recv() for pipe in self._pipes]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()


def start_method() -> Any:
    """Forks of a process that has imported what takes long; a GPU forbids forks."""
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["megatron_adalrs.training.build", "deepspeed.runtime.zero.muon.muon_optimizer"]
    )
    return context


def _enter(
    rank: int, ranks: int, port: int, serve: Callable[..., None], pipe: Connection, arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(THREADS),
    }
    import torch

    torch.set_num_threads(THREADS)
    serve(pipe, *arguments)
    os._exit(0)  # an interpreter that has imported torch takes a second to leave in good order
