"""Ranks are coordinates of an array, counted with the tensor coordinate fastest."""

from __future__ import annotations

import pytest

from megatron_adalrs.parallel.topology import AXES, Grid, GridShape


def test_ranks_count_tensor_fastest_and_pipe_slowest() -> None:
    shape = GridShape(pipe=2, data=2, context=1, tensor=2)
    assert shape.coordinates(1) == {"pipe": 0, "data": 0, "context": 0, "tensor": 1}
    assert shape.coordinates(2) == {"pipe": 0, "data": 1, "context": 0, "tensor": 0}
    assert shape.coordinates(4) == {"pipe": 1, "data": 0, "context": 0, "tensor": 0}


def test_groups_along_an_axis() -> None:
    shape = GridShape(pipe=2, data=2, tensor=2)
    assert shape.lines("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert shape.lines("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert shape.lines("pipe") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_replicas_are_the_ranks_that_differ_in_data_and_context_only() -> None:
    shape = GridShape(data=2, context=2, tensor=2)
    assert shape.lines("data", "context") == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("axis", AXES)
def test_every_rank_is_in_one_group_of_each_axis(axis: str) -> None:
    shape = GridShape(pipe=3, data=2, context=2, tensor=4)
    assert sorted(rank for line in shape.lines(axis) for rank in line) == list(range(48))


def test_what_the_model_axes_leave_over_is_data_parallel() -> None:
    assert GridShape.of_world(24, pipe=2, tensor=3) == GridShape(pipe=2, data=4, context=1, tensor=3)


def test_an_impossible_grid_shows_the_arithmetic() -> None:
    with pytest.raises(ValueError, match=r"world size 6 is not a multiple of .*\(2\).*\(2\) = 4: 6 = 1 x 4 \+ 2"):
        GridShape.of_world(6, pipe=2, tensor=2)


def test_a_process_without_a_launcher_is_a_grid_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    grid = Grid.from_environment()
    assert (grid.world_size, grid.rank, grid.is_first) == (1, 0, True)


def test_the_launcher_announces_rank_and_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    grid = Grid.from_environment(tensor=2)
    assert (grid.data.rank, grid.tensor.rank, grid.local_rank, grid.is_first) == (1, 1, 1, False)
    assert (grid.replica.rank, grid.replica.size) == (1, 2)
    grid = Grid.from_environment(context=2)
    assert (grid.data.rank, grid.context.rank, grid.replica.rank, grid.replica.size) == (1, 1, 3, 4)
