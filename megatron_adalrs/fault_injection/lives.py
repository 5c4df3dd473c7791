"""One life of a run: its two ranks, forked from a process that has imported what takes long, and their end."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

RANKS = 2
PROGRAM = "megatron_adalrs.commands.pretrain"


class Life:
    """`pretrain_gpt.py` on two ranks, which write what they have to say into the file `said`."""

    def __init__(self, arguments: list[str], said: Path) -> None:
        self.began = time.monotonic()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ["DS_ACCELERATOR"] = "cpu"  # which DeepSpeed reads when it is imported
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["megatron_adalrs.training.build", "deepspeed.runtime.zero.muon.muon_optimizer"]
        )
        self._ranks: list[Any] = []
        for rank in range(RANKS):
            process = context.Process(target=_live, args=(rank, port, arguments, str(said)), daemon=True)
            process.start()
            self._ranks.append(process)

    @property
    def age(self) -> float:
        """Seconds."""
        return time.monotonic() - self.began

    @property
    def is_over(self) -> bool:
        return all(process.exitcode is not None for process in self._ranks)

    @property
    def exit_codes(self) -> list[int | None]:
        return [process.exitcode for process in self._ranks]

    def kill(self, rank: int) -> None:
        """SIGKILL."""
        self._ranks[rank].kill()

    def end(self, seconds: float = 0.0) -> bool:
        """Wait so long for ranks to leave by themselves, then kill them. Returns whether all had left."""
        deadline = time.monotonic() + seconds
        while not self.is_over and (left := deadline - time.monotonic()) > 0:
            wait([process.sentinel for process in self._ranks if process.exitcode is None], left)
        had_left = self.is_over
        for process in self._ranks:
            process.kill()
        for process in self._ranks:
            process.join()
        return had_left


def _live(rank: int, port: int, arguments: list[str], said: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    import torch

    torch.set_num_threads(1)
    code = importlib.import_module(PROGRAM).main(arguments)
    sys.stdout.flush()
    os._exit(code)  # an interpreter that has imported torch takes a second to leave in good order
