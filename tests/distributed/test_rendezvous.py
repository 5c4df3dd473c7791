"""Rendezvous of ranks in a store that earlier attempts have used."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_adalrs.distributed.rendezvous import rendezvous

PATIENCE = timedelta(seconds=30)


@pytest.fixture
def connect() -> Callable[[], dist.Store]:
    """Return a function that connects to one store, such as torchrun's agent serves to every attempt."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=PATIENCE, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=PATIENCE)


class ObservedStore:
    """A connection that reports the first wait of its rank."""

    def __init__(self, store: dist.Store, waits: threading.Event) -> None:
        self._store = store
        self._waits = waits

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        return self._store.get(key)

    def check(self, keys: list[str]) -> bool:
        return self._store.check(keys)

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        self._waits.set()
        self._store.wait(keys, timeout)


def names_of(connect: Callable[[], dist.Store], late: int | None = None, ranks: int = 3) -> list[str]:
    """Return the names that the ranks get; the rank `late` begins when all others wait."""
    names: dict[int, str] = {}
    waits = [threading.Event() for _ in range(ranks)]

    def join(rank: int) -> None:
        if rank == late:
            for other in range(ranks):
                assert other == rank or waits[other].wait(PATIENCE.total_seconds())
        names[rank] = rendezvous(ObservedStore(connect(), waits[rank]), rank, ranks, PATIENCE)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [names[rank] for rank in range(ranks)]


@pytest.mark.parametrize("late", [0, 1, None], ids=["first", "other", "none"])
def test_every_attempt_has_its_own_name(connect: Callable[[], dist.Store], late: int | None) -> None:
    before = names_of(connect)
    after = names_of(connect, late)
    assert len(set(before)) == len(set(after)) == 1
    assert before != after


def test_the_name_of_a_dead_first_rank_is_not_used(connect: Callable[[], dist.Store]) -> None:
    with pytest.raises(dist.DistStoreError, match="rank 1, 2 did not connect in time"):
        rendezvous(connect(), 0, 3, timedelta(seconds=0.1))
    assert len(set(names_of(connect, late=0))) == 1


def test_a_missing_first_rank_is_an_error(connect: Callable[[], dist.Store]) -> None:
    with pytest.raises(dist.DistStoreError, match="the first rank did not connect in time"):
        rendezvous(connect(), 1, 2, timedelta(seconds=0.5))
