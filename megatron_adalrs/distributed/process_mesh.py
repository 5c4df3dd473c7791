"""The mesh of processes: pipe x data x context x tensor, with the tensor coordinate varying fastest.

DeepSpeed's PipeModelDataParallelTopology has the same order of pipe, data and model. A MeshAxis is one
direction of the mesh as seen by one process; layers and collectives take only the MeshAxis along which they
work.
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
    """Number of processes along each axis of the mesh."""

    pipe: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1

    @classmethod
    def of_world(cls, world_size: int, pipe: int = 1, context: int = 1, tensor: int = 1) -> MeshShape:
        """Return the shape that uses all ranks; those that the other axes leave are data-parallel.

        Raises:
            ValueError: The world size is not a multiple of the other sizes.
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
        """Number of processes."""
        return self.pipe * self.data * self.context * self.tensor

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the coordinate of a rank on each axis."""
        return dict(zip(AXES, (int(i) for i in np.unravel_index(rank, self._sizes)), strict=True))

    def lines(self, *axes: str) -> list[list[int]]:
        """Return the ranks of every group along one or more axes, in ascending order."""
        ranks = np.arange(self.world_size).reshape(self._sizes)
        last = [AXES.index(axis) for axis in axes]
        size = math.prod(getattr(self, axis) for axis in axes)
        lines: list[list[int]] = np.moveaxis(ranks, last, range(-len(last), 0)).reshape(-1, size).tolist()
        return lines

    @property
    def _sizes(self) -> tuple[int, ...]:
        return (self.pipe, self.data, self.context, self.tensor)


@dataclass(frozen=True)
class MeshAxis:
    """One direction of the mesh: this process's coordinate, the number of processes and their process group.

    An axis of one process has no group; collectives along it return at once.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process has the lowest coordinate."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this process has the highest coordinate."""
        return self.rank == self.size - 1


@dataclass(frozen=True)
class ProcessMesh:
    """Position of this process in the mesh."""

    shape: MeshShape
    rank: int = 0
    local_rank: int = 0
    """Rank within this host, which is the index of the device."""
    pipe: MeshAxis = MeshAxis()
    data: MeshAxis = MeshAxis()
    context: MeshAxis = MeshAxis()
    tensor: MeshAxis = MeshAxis()
    replica: MeshAxis = MeshAxis()
    """Data and context axes combined: the ranks with the same parameters, whose gradients are averaged."""

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.shape.world_size

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes what all ranks have in common."""
        return self.rank == 0

    @property
    def tensor_group(self) -> int:
        """Index of this process's tensor group. Its ranks read the same samples and share a random stream."""
        return self.rank // self.tensor.size

    @classmethod
    def from_environment(cls, pipe: int = 1, context: int = 1, tensor: int = 1) -> ProcessMesh:
        """Return the position given by RANK, WORLD_SIZE and LOCAL_RANK, without process groups.

        Raises:
            ValueError: The world size is not a multiple of the sizes.
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
        """Return this position with a process group on every axis of several processes. Collective."""
        import torch.distributed as dist

        def with_group(axis: MeshAxis, *names: str) -> MeshAxis:
            lines = self.shape.lines(*names)
            # Every process must call new_group for every group, also for those that it is not in.
            groups = [dist.new_group(line) if axis.size > 1 else None for line in lines]
            mine = next(i for i, line in enumerate(lines) if self.rank in line)
            return replace(axis, group=groups[mine])

        pipe, data, context, tensor = (with_group(getattr(self, name), name) for name in AXES)
        replica = data if context.size == 1 else with_group(self.replica, "data", "context")
        return replace(self, pipe=pipe, data=data, context=context, tensor=tensor, replica=replica)


ONE_RANK = MeshAxis()
ONE_PROCESS = ProcessMesh(MeshShape())
