"""Losses and gradient norms do not depend on how many ranks share the work, nor on the ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_adalrs.engine import Engine
from megatron_adalrs.parallel.collectives import gather_numbers, on_every_rank, on_first_rank
from megatron_adalrs.parallel.topology import Grid
from tests.distributed.ranks import RankFailure, Ranks
from tests.distributed.runs import micro_batches, tiny_config


def evaluation(values: dict[str, Any]) -> tuple[float, float]:
    config, grid = tiny_config(**values), Grid.from_environment()
    engine = Engine(config, 256, grid)
    steps = [micro_batches(config, grid, step) for step in range(3)]
    before = engine.evaluate(iter(steps))
    return before, engine.evaluate(iter(steps))


def test_evaluation_is_the_same_on_any_number_of_ranks_and_leaves_no_trace(one_rank: Ranks, two_ranks: Ranks) -> None:
    values = {"hidden_dropout": 0.5}
    ((expected, again),) = one_rank.run(evaluation, values)
    assert expected == again
    for loss, _ in two_ranks.run(evaluation, values):
        assert loss == pytest.approx(expected, rel=1e-6)


def stop_asked_by(rank: int) -> bool:
    config, grid = tiny_config(), Grid.from_environment()
    engine = Engine(config, 256, grid)
    return engine.train_batch(micro_batches(config, grid, 0), stop=grid.rank == rank).stop_requested


def test_a_stop_asked_by_one_rank_reaches_all(two_ranks: Ranks) -> None:
    assert two_ranks.run(stop_asked_by, 1) == [True, True]
    assert two_ranks.run(stop_asked_by, 5) == [False, False]


def gathered() -> list[list[float]]:
    grid = Grid.from_environment()
    return gather_numbers([0.1 + grid.rank, 1.0], torch.device("cpu")).tolist()


def test_gathered_numbers_are_the_same_everywhere(two_ranks: Ranks) -> None:
    assert two_ranks.run(gathered) == [[[0.1, 1.0], [1.1, 1.0]]] * 2


def failing_on(rank: int, first_only: bool) -> str:
    grid = Grid.from_environment()

    def fail() -> None:
        if grid.rank == rank:
            raise OSError("disk on fire")

    try:
        (on_first_rank if first_only else on_every_rank)(fail)
    except ValueError as error:
        return str(error)
    return "fine"


def test_an_error_on_one_rank_is_raised_on_all(two_ranks: Ranks) -> None:
    assert two_ranks.run(failing_on, 0, first_only=True) == ["disk on fire"] * 2
    assert two_ranks.run(failing_on, 1, first_only=False) == ["rank 1: disk on fire"] * 2
    assert two_ranks.run(failing_on, 1, first_only=True) == ["fine"] * 2


def die_on_rank_one() -> None:
    if Grid.from_environment().rank == 1:
        raise KeyError("boom")


def test_the_ranks_of_the_tests_report_failures_and_recover() -> None:
    ranks = Ranks(2)
    with pytest.raises(RankFailure, match=r"rank 1:(.|\n)*boom"):
        ranks.run(die_on_rank_one)
    assert ranks.run(failing_on, 5, first_only=True) == ["fine"] * 2
    ranks.close()
