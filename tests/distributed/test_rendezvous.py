"""Ranks that meet in a store in which others have met before."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_adalrs.distributed.rendezvous import rendezvous

PATIENCE = timedelta(seconds=30)


@pytest.fixture
def connect() -> Callable[[], dist.Store]:
    """Connections to one store, as torchrun's agent serves it to every attempt."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=PATIENCE, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=PATIENCE)


def met(connect: Callable[[], dist.Store], late: dict[int, float], ranks: int = 3) -> list[str]:
    """The names that ranks get, which begin so many seconds late."""
    names: dict[int, str] = {}

    def join(rank: int) -> None:
        time.sleep(late.get(rank, 0))
        names[rank] = rendezvous(connect(), rank, ranks, PATIENCE)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [names[rank] for rank in range(ranks)]


@pytest.mark.parametrize("late", [{0: 0.3}, {1: 0.3}, {}], ids=["first", "other", "none"])
def test_every_attempt_gets_a_name_of_its_own(
    connect: Callable[[], dist.Store], late: dict[int, float]
) -> None:
    before = met(connect, {})
    after = met(connect, late)
    assert len(set(before)) == len(set(after)) == 1
    assert before != after


def test_a_name_that_a_dead_first_rank_left_is_not_taken(connect: Callable[[], dist.Store]) -> None:
    with pytest.raises(dist.DistStoreError, match="rank 1, 2 did not connect in time"):
        rendezvous(connect(), 0, 3, timedelta(seconds=0.1))
    assert len(set(met(connect, {0: 0.5}))) == 1


def test_a_first_rank_that_never_comes_is_waited_for_in_vain(connect: Callable[[], dist.Store]) -> None:
    with pytest.raises(dist.DistStoreError, match="the first rank did not connect in time"):
        rendezvous(connect(), 1, 2, timedelta(seconds=0.5))
