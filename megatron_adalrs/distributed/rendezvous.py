"""Ranks meet in a store that earlier attempts of the same job may have used.

With `torchrun --max-restarts` the agents keep one store for all attempts (torch 2.13, either rendezvous), and
what the process group writes into it has the same names each time: a rank that is first reads where a dead
one listened, and its attempt fails with "connection refused". TORCHELASTIC_RESTART_COUNT cannot tell attempts
apart: it counts the failures of each node by itself. So the ranks agree on a name of their attempt here,
under which they then write.
"""

from __future__ import annotations

import time
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

_ATTEMPT = "megatron_adalrs/attempt"
_ROUND = timedelta(seconds=1)


def rendezvous(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Find the other ranks of this attempt. Collective. Returns its name, the same on every rank and never
    used before.

    The first rank names the attempt. Every other one greets it under that name with a word of its own until
    the word comes back: a name that a dead first rank has left is answered by nobody, or with the word of a
        dead rank.

    Raises:
        torch.distributed.DistStoreError: not all ranks came within `timeout`; the first one says which.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        attempt = uuid4().hex
        store.set(_ATTEMPT, attempt)
        _welcome(store, attempt, set(range(1, world_size)), deadline)
        return attempt
    word = uuid4().hex
    while time.monotonic() < deadline:
        try:
            store.wait([_ATTEMPT], _ROUND)
            attempt = store.get(_ATTEMPT).decode()
            store.set(f"{attempt}/greeting/{rank}", word)
            answer = f"{attempt}/answer/{rank}"
            store.wait([answer], _ROUND)
            if store.get(answer).decode() == word:
                return attempt
            time.sleep(0.1)
        except dist.DistStoreError:  # nothing within a round
            continue
    raise dist.DistStoreError("the first rank did not come in time")


def _welcome(store: dist.Store, attempt: str, missing: set[int], deadline: float) -> None:
    """Answer every greeting."""
    while missing:
        for rank in sorted(missing):
            greeting = f"{attempt}/greeting/{rank}"
            try:
                store.wait([greeting], _ROUND)
            except dist.DistStoreError:
                break
            store.set(f"{attempt}/answer/{rank}", store.get(greeting).decode())
            missing.remove(rank)
        if missing and time.monotonic() > deadline:
            late = [rank for rank in sorted(missing) if not store.check([f"{attempt}/greeting/{rank}"])]
            names = ", ".join(map(str, late[:8])) + (f" and {len(late) - 8} more" if len(late) > 8 else "")
            raise dist.DistStoreError(f"rank {names} did not come in time")
