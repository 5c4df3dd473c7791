"""The mesh of processes: pipe x data x context x tensor, ranks counted with the tensor coordinate fastest.

DeepSpeed's PipeModelDataParallelTopology counts pipe, data, model the same way. An MeshAxis is one direction
of the mesh as one process sees it; layers and collectives take the MeshAxis they work along and nothing else.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

AXES = ("pipe", "data", "context", "tensor")


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh."""

    pipe: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1

    @classmethod
    def of_world(cls, world_size: int, pipe: int = 1, context: int = 1, tensor: int = 1) -> MeshShape:
        """The shape that fills a world: what pipe, context and tensor leave over is data-parallel.

        Raises:
            ValueError: they do not divide the world; the arithmetic is shown.
        """
        model = pipe * context * tensor
        if world_size % model:
            raise ValueError(
                f"world size {world_size} is not a multiple of pipeline_model_parallel_size({pipe}) x "
                f"context_parallel_size({context}) x tensor_model_parallel_size({tensor}) = {model}: "
                f"{world_size} = {world_size // model} x {model} + {world_size % model}"
            )
        return cls(pipe, world_size // model, context, tensor)

    @property
    def world_size(self) -> int:
        return self.pipe * self.data * self.context * self.tensor

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands on each axis."""
        return dict(zip(AXES, (int(i) for i in np.unravel_index(rank, self._sizes)), strict=True))

    def lines(self, *axes: str) -> list[list[int]]:
        """The ranks of every group along an axis, or over several, each in the order of the ranks."""
        ranks = np.arange(self.world_size).reshape(self._sizes)
        last = [AXES.index(axis) for axis in axes]
        size = math.prod(getattr(self, axis) for axis in axes)
        return np.moveaxis(ranks, last, range(-len(last), 0)).reshape(-1, size).tolist()

    @property
    def _sizes(self) -> tuple[int, ...]:
        return (self.pipe, self.data, self.context, self.tensor)


@dataclass(frozen=True)
class MeshAxis:
    """One direction of the mesh: this process's coordinate, the number of processes, and their process group.

    An axis of one process needs no group; collectives along it return at once.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True)
class ProcessMesh:
    """This process's place in the mesh."""

    shape: MeshShape
    rank: int = 0
    local_rank: int = 0
    """Rank within this host, which picks the device."""
    pipe: MeshAxis = MeshAxis()
    data: MeshAxis = MeshAxis()
    context: MeshAxis = MeshAxis()
    tensor: MeshAxis = MeshAxis()
    replica: MeshAxis = MeshAxis()
    """Data and context axis in one: the ranks that hold the same parameters, whose gradients are averaged."""

    @property
    def world_size(self) -> int:
        return self.shape.world_size

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all: it prints and writes what every rank knows."""
        return self.rank == 0

    @property
    def tensor_group(self) -> int:
        """Number of this process's tensor group: its ranks read the same samples and share a random
        stream."""
        return self.rank // self.tensor.size

    @classmethod
    def from_environment(cls, pipe: int = 1, context: int = 1, tensor: int = 1) -> ProcessMesh:
        """Place in the mesh of the ranks that the launcher announced in RANK and WORLD_SIZE; no groups yet.

        Raises:
            ValueError: the sizes do not divide the world.
        """
        rank, world_size, local_rank = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
        shape = MeshShape.of_world(world_size, pipe, context, tensor)
        place = shape.coordinates(rank)
        axes = {name: MeshAxis(place[name], getattr(shape, name)) for name in AXES}
        replica = MeshAxis(place["data"] * shape.context + place["context"], shape.data * shape.context)
        return cls(shape, rank, local_rank, **axes, replica=replica)

    def with_groups(self) -> ProcessMesh:
        """The same place with a process group along every axis of more than one process. Collective."""
        import torch.distributed as dist

        def with_group(axis: MeshAxis, *names: str) -> MeshAxis:
            lines = self.shape.lines(*names)
            # Every process takes part in making every group, also those that it is not in.
            groups = [dist.new_group(line) if axis.size > 1 else None for line in lines]
            mine = next(i for i, line in enumerate(lines) if self.rank in line)
            return replace(axis, group=groups[mine])

        axes = {name: with_group(getattr(self, name), name) for name in AXES}
        is_data = self.context.size == 1
        return replace(
            self, **axes, replica=axes["data"] if is_data else with_group(self.replica, "data", "context")
        )


ONE_RANK = MeshAxis()
ONE_PROCESS = ProcessMesh(MeshShape())
