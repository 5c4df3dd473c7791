"""Gloo ranks for tests: processes that are started once, form one process group, and are reused by all
tests."""

from __future__ import annotations

import gc
import importlib
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from megatron_adalrs.distributed.local_ranks import LocalRanks, RankFailure

TIMEOUT_SECONDS = 180


class Ranks:
    """`world_size` processes in one process group, started by the first call of `run`."""

    def __init__(self, world_size: int, accelerator: str = "cpu") -> None:
        self.world_size = world_size
        self._accelerator = accelerator
        self._ranks: LocalRanks | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        """Call a module-level function on all ranks and return their results in rank order.

        Raises:
            RankFailure: A rank raised, died or did not answer in time; the message has its traceback. All
                ranks are then killed, and the next call starts new ones.
        """
        if self._ranks is None:
            self._ranks = LocalRanks(self.world_size, _serve, accelerator=self._accelerator)
        results: dict[int, Any] = {}
        try:
            self._ranks.send((function.__module__, function.__qualname__, arguments, options))
            for rank, (succeeded, result) in self._ranks.answers(TIMEOUT_SECONDS):
                if not succeeded:
                    raise RankFailure(f"rank {rank}:\n{result}")
                results[rank] = result
        except RankFailure:
            self._ranks.kill()
            self.close()
            raise
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the processes."""
        if self._ranks is not None:
            self._ranks.close(timeout=5)
            self._ranks = None


def _serve(pipe: Connection) -> None:
    """Call the functions whose names arrive through the pipe, and answer with their results."""
    from megatron_adalrs.distributed.process_mesh import ProcessMesh
    from megatron_adalrs.engine import end_distributed, init_distributed

    _share_one_gloo_device()
    init_distributed(ProcessMesh.from_environment())
    groups = _Groups()
    gc.freeze()  # exclude the imported modules from the collections after every test
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


def _share_one_gloo_device() -> None:
    """Make all process groups of this process use one gloo device.

    By default each group has a device with a thread that wakes a hundred times a second. Engines keep their
    groups alive, so that a suite ends with hundreds of them, which would take half of its time.
    """
    from torch.distributed import ProcessGroupGloo

    device = ProcessGroupGloo.create_default_device()
    initialise = ProcessGroupGloo.__init__

    def initialise_on_device(group: Any, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._devices = [device]
        options._threads = 2
        options._timeout = timeout
        initialise(group, store, rank, size, options)

    # torch has no option for the device of the groups that it makes.
    ProcessGroupGloo.__init__ = initialise_on_device  # type: ignore[method-assign]


class _Groups:
    """Process groups of a rank that serves tests.

    A mesh's groups are made once and kept; an engine's groups are destroyed after its test.
    """

    def __init__(self) -> None:
        from megatron_adalrs.distributed.process_mesh import ProcessMesh

        self._meshes: dict[ProcessMesh, ProcessMesh] = {}
        make = ProcessMesh.with_groups

        def with_groups(mesh: ProcessMesh) -> ProcessMesh:
            if mesh not in self._meshes:
                self._meshes[mesh] = make(mesh)
            return self._meshes[mesh]

        # The code under test makes its meshes itself.
        ProcessMesh.with_groups = with_groups  # type: ignore[method-assign]

    def end_of_test(self) -> None:
        """Destroy the process groups that do not belong to a mesh, to the world or to DeepSpeed's state."""
        import torch.distributed as dist
        from deepspeed.utils import groups as deepspeed_groups

        kept = [dist.group.WORLD, *vars(deepspeed_groups).values()]
        for mesh in self._meshes.values():
            kept += [axis.group for axis in (mesh.pipe, mesh.data, mesh.context, mesh.tensor, mesh.replica)]
        gc.collect()
        for group in list(dist.distributed_c10d._world.pg_map):
            if not any(group is one for one in kept):
                dist.destroy_process_group(group)
