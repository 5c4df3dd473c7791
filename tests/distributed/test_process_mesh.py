"""Coordinates and groups of the ranks of a mesh."""

from __future__ import annotations

import pytest

from megatron_adalrs.distributed.process_mesh import AXES, MeshShape, ProcessMesh


def test_the_tensor_coordinate_varies_fastest() -> None:
    shape = MeshShape(pipe=2, data=2, context=1, tensor=2)
    assert shape.coordinates(1) == {"pipe": 0, "data": 0, "context": 0, "tensor": 1}
    assert shape.coordinates(2) == {"pipe": 0, "data": 1, "context": 0, "tensor": 0}
    assert shape.coordinates(4) == {"pipe": 1, "data": 0, "context": 0, "tensor": 0}


def test_groups_along_an_axis() -> None:
    shape = MeshShape(pipe=2, data=2, tensor=2)
    assert shape.lines("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert shape.lines("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert shape.lines("pipe") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_replicas_differ_in_data_and_context_only() -> None:
    shape = MeshShape(data=2, context=2, tensor=2)
    assert shape.lines("data", "context") == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("axis", AXES)
def test_every_rank_is_in_one_group_per_axis(axis: str) -> None:
    shape = MeshShape(pipe=3, data=2, context=2, tensor=4)
    assert sorted(rank for line in shape.lines(axis) for rank in line) == list(range(48))


def test_the_remaining_ranks_are_data_parallel() -> None:
    assert MeshShape.of_world(24, pipe=2, tensor=3) == MeshShape(pipe=2, data=4, context=1, tensor=3)


def test_an_impossible_mesh_shows_the_arithmetic() -> None:
    with pytest.raises(
        ValueError, match=r"world size 6 is not a multiple of .*\(2\).*\(2\) = 4: 6 = 1 x 4 \+ 2"
    ):
        MeshShape.of_world(6, pipe=2, tensor=2)


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    mesh = ProcessMesh.from_environment()
    assert (mesh.world_size, mesh.rank, mesh.is_first) == (1, 0, True)


def test_the_environment_gives_rank_and_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    mesh = ProcessMesh.from_environment(tensor=2)
    assert (mesh.data.rank, mesh.tensor.rank, mesh.local_rank, mesh.is_first) == (1, 1, 1, False)
    assert (mesh.replica.rank, mesh.replica.size) == (1, 2)
    mesh = ProcessMesh.from_environment(context=2)
    assert (mesh.data.rank, mesh.context.rank, mesh.replica.rank, mesh.replica.size) == (1, 1, 3, 4)
