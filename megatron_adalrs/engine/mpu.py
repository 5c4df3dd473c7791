"""The process mesh in the form that DeepSpeed expects."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_adalrs.distributed.process_mesh import ProcessMesh


class ModelParallelUnit:
    """DeepSpeed's interface to a mesh.

    DeepSpeed's model-parallel axis is the tensor axis, and its data-parallel axis is made of all ranks that
    hold the same parameters: those of the data and the context axis.
    """

    def __init__(self, mesh: ProcessMesh) -> None:
        self._mesh = mesh
        self._data_group = mesh.replica.group
        if mesh.replica.size == 1:
            # An axis of one rank has no group, and DeepSpeed takes no group for the whole world.
            self._data_group, _ = dist.new_subgroups(group_size=1)  # type: ignore[no-untyped-call]  # torch

    def get_data_parallel_rank(self) -> int:
        """Return this rank's position among the ranks that hold the same parameters."""
        return self._mesh.replica.rank

    def get_data_parallel_world_size(self) -> int:
        """Return the number of ranks that hold the same parameters."""
        return self._mesh.replica.size

    def get_data_parallel_group(self) -> Any:
        """Return the process group of the ranks that hold the same parameters."""
        return self._data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Return the global ranks of that group."""
        return dist.get_process_group_ranks(self._data_group)

    def get_model_parallel_rank(self) -> int:
        """Return this rank's position on the tensor axis."""
        return self._mesh.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        """Return the size of the tensor axis."""
        return self._mesh.tensor.size

    def get_model_parallel_group(self) -> Any:
        """Return the process group of the tensor axis."""
        return self._mesh.tensor.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
