"""Real gloo ranks for tests: processes that are started once, joined in one process group, and reused by
every test."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_SECONDS = 180


class RankFailure(Exception):
    """A rank raised, died or did not answer in time; the message holds its traceback."""


class Ranks:
    """`world_size` processes in one process group. `run` calls a function on all of them at once."""

    def __init__(self, world_size: int, accelerator: str = "cpu") -> None:
        self.world_size, self._accelerator = world_size, accelerator
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        """Results of a module-level function, one a rank, in rank order.

        Raises:
            RankFailure: on any failure; the ranks are then ended, and started afresh by the next call.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, arguments, options))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(results) < self.world_size:
            pending = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"no answer within {TIMEOUT_SECONDS} s from ranks other than {sorted(results)}")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    succeeded, result = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    self._fail(f"rank {rank} died")
                if not succeeded:
                    self._fail(f"rank {rank}:\n{result}")
                results[rank] = result
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        starts = context(self._accelerator)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world_size):
            ours, theirs = starts.Pipe()
            process = starts.Process(
                target=_serve, args=(rank, self.world_size, port, self._accelerator, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _fail(self, message: str) -> None:
        for process in self._processes:
            process.kill()
        self.close()
        raise RankFailure(message)


def context(accelerator: str) -> Any:
    """How ranks are started: on processors as forks of a process that has imported what takes long, and run
    nothing."""
    if accelerator != "cpu":
        return multiprocessing.get_context("spawn")
    os.environ["DS_ACCELERATOR"] = accelerator  # which DeepSpeed reads when it is imported
    starts = multiprocessing.get_context("forkserver")
    # The second, with torch's compiler, is what DeepSpeed imports for the first ZeRO optimizer: 2.5 s in each
    # process.
    starts.set_forkserver_preload(
        ["megatron_adalrs.training.build", "deepspeed.runtime.zero.muon.muon_optimizer"]
    )
    return starts


def _serve(rank: int, world_size: int, port: int, accelerator: str, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": accelerator,
    }
    import torch

    from megatron_adalrs.distributed.process_mesh import ProcessMesh
    from megatron_adalrs.engine import end_distributed, init_distributed

    torch.set_num_threads(1)
    _share_one_gloo_device()
    init_distributed(ProcessMesh.from_environment())
    groups = _Groups()
    gc.freeze()  # what is imported need not be searched for garbage after every test
    while True:
        try:
            module, name, arguments, options = pipe.recv()
        except EOFError:
            break
        try:
            function = getattr(importlib.import_module(module), name)
            answer = (True, function(*arguments, **options))
        except BaseException:
            answer = (False, traceback.format_exc())
        groups.end_of_test()
        pipe.send(answer)
    end_distributed()
    os._exit(0)  # an interpreter that has imported torch takes a second to leave in good order


def _share_one_gloo_device() -> None:
    """For all groups of this process. Each would have a thread of its own that wakes a hundred times a
    second, and what engines leave behind keeps groups alive: hundreds of them by the end of a suite, and half
        of its time.
    """
    from torch.distributed import ProcessGroupGloo

    device = ProcessGroupGloo.create_default_device()
    initialise = ProcessGroupGloo.__init__

    def initialise_on_device(group: Any, store: Any, rank: int, size: int, timeout: Any) -> None:
        options = ProcessGroupGloo._Options()
        options._devices, options._threads, options._timeout = [device], 2, timeout
        initialise(group, store, rank, size, options)

    ProcessGroupGloo.__init__ = initialise_on_device  # type: ignore[method-assign]


class _Groups:
    """Process groups of a rank that serves tests: a mesh's are made once, an engine's end with its test."""

    def __init__(self) -> None:
        from megatron_adalrs.distributed.process_mesh import ProcessMesh

        self._meshes: dict[ProcessMesh, ProcessMesh] = {}
        make = ProcessMesh.with_groups

        def with_groups(mesh: ProcessMesh) -> ProcessMesh:
            if mesh not in self._meshes:
                self._meshes[mesh] = make(mesh)
            return self._meshes[mesh]

        ProcessMesh.with_groups = with_groups  # type: ignore[method-assign]

    def end_of_test(self) -> None:
        import torch.distributed as dist
        from deepspeed.utils import groups as of_deepspeed

        kept = [dist.group.WORLD, *vars(of_deepspeed).values()]
        for mesh in self._meshes.values():
            kept += [axis.group for axis in (mesh.pipe, mesh.data, mesh.context, mesh.tensor, mesh.replica)]
        gc.collect()
        for group in list(dist.distributed_c10d._world.pg_map):
            if not any(group is one for one in kept):
                dist.destroy_process_group(group)
