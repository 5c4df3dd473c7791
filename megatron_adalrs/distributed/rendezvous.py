"""Rendezvous of the ranks of one attempt of a job in a store, and its errors.

With `torchrun --max-restarts` the agents keep one store for all attempts (torch 2.13, either rendezvous), and
the process group writes the same keys into it in each attempt: a rank that reads the address of a first rank
that has died fails with "connection refused". TORCHELASTIC_RESTART_COUNT does not identify an attempt,
because every node counts its failures by itself. The ranks therefore agree on a name for their attempt here,
and use it as the prefix of their keys.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Protocol
from uuid import uuid4

import torch.distributed as dist

from megatron_adalrs.utils.format import first_line

LOST = 4
"""Exit code of a rank that exits because another one was lost."""
_ATTEMPT = "megatron_adalrs/attempt"
_ROUND = timedelta(seconds=1)
_SECONDS_TO_PRINT = 5.0


class Store(Protocol):
    """Methods of torch.distributed's key-value stores that this package uses."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...

    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...


def rendezvous(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Wait for all ranks of this attempt and return its name. Collective.

    The first rank chooses the name. Every other rank writes a random token under the name that it reads, and
    waits until the first rank has copied it to another key. A name that an earlier attempt has left in the
    store gets no answer, or an old token.

    Returns:
        A name that is the same on every rank and that no other attempt has.

    Raises:
        torch.distributed.DistStoreError: Not all ranks came within `timeout`; the first rank's message names
            those that are missing.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        attempt = uuid4().hex
        store.set(_ATTEMPT, attempt)
        _answer_tokens(store, attempt, set(range(1, world_size)), deadline)
        return attempt
    token = uuid4().hex
    while time.monotonic() < deadline:
        try:
            store.wait([_ATTEMPT], _ROUND)
            attempt = store.get(_ATTEMPT).decode()
            store.set(f"{attempt}/token/{rank}", token)
            answer = f"{attempt}/answer/{rank}"
            store.wait([answer], _ROUND)
            if store.get(answer).decode() == token:
                return attempt
            time.sleep(0.1)
        except dist.DistStoreError:  # no answer within a round
            continue
    raise dist.DistStoreError("the first rank did not connect in time")


def _answer_tokens(store: Store, attempt: str, missing: set[int], deadline: float) -> None:
    """Copy the token of every missing rank to the key at which that rank waits for it."""
    while missing:
        for rank in sorted(missing):
            token = f"{attempt}/token/{rank}"
            try:
                store.wait([token], _ROUND)
            except dist.DistStoreError:
                break
            store.set(f"{attempt}/answer/{rank}", store.get(token).decode())
            missing.remove(rank)
        if missing and time.monotonic() > deadline:
            late = [rank for rank in sorted(missing) if not store.check([f"{attempt}/token/{rank}"])]
            names = ", ".join(map(str, late[:8])) + (f" and {len(late) - 8} more" if len(late) > 8 else "")
            raise dist.DistStoreError(f"rank {names} did not connect in time")


@contextmanager
def rendezvous_errors() -> Iterator[None]:
    """Join the process group in this context: if ranks are missing, print so and exit with code `LOST`."""
    try:
        yield
    except RuntimeError as error:
        if not is_failed_collective(error):
            raise
        rank = os.environ.get("RANK")
        world_size = os.environ.get("WORLD_SIZE")
        print_error(
            f"rank {rank} on {socket.gethostname()} did not find all {world_size} ranks at "
            f"{store_address()}: {first_line(error)}"
        )
        os._exit(LOST)


def is_failed_collective(error: RuntimeError) -> bool:
    """Return whether an error is one of the process group: of torch's own types, or with gloo's text."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "Connection closed by peer" in text


def connect(attempt: str, timeout: float) -> Store:
    """Open another connection to the store that the launcher or the first rank serves.

    Args:
        attempt: Prefix of all keys, see `rendezvous`.
        timeout: Seconds to wait for the store.

    Raises:
        RuntimeError: The store does not answer in time.
    """
    # torch.distributed has these classes only if torch was built with it, so it does not mark them as public.
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))
    return PrefixStore(attempt, store)


def store_address() -> str:
    """Return HOST:PORT of the store."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def print_error(message: str, timeout: float = _SECONDS_TO_PRINT) -> None:
    """Print an error message to standard error, for at most `timeout` seconds.

    A process that is about to exit must not wait for the reader of its output, which may have died or be
    behind a broken network link.
    """

    def write() -> None:
        with suppress(OSError):
            print(f"error: {message}", file=sys.stderr, flush=True)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(timeout)
