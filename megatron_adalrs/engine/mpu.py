"""The mesh in the words in which DeepSpeed asks for it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_adalrs.distributed.process_mesh import ProcessMesh


class ModelParallelUnit:
    """The mesh as DeepSpeed asks for it: what it calls model-parallel is the tensor axis, data-parallel are
    all ranks that hold the same parameters."""

    def __init__(self, mesh: ProcessMesh) -> None:
        self._mesh = mesh
        self._data_group = mesh.replica.group
        if mesh.replica.size == 1:
            # DeepSpeed takes no group for the whole world.
            self._data_group, _ = dist.new_subgroups(group_size=1)

    def get_data_parallel_rank(self) -> int:
        return self._mesh.replica.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.replica.size

    def get_data_parallel_group(self) -> Any:
        return self._data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._data_group)

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tensor.size

    def get_model_parallel_group(self) -> Any:
        return self._mesh.tensor.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
