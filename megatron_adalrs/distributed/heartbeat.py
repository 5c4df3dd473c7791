"""Ranks that watch each other: when one dies or stands still, the others leave within a bounded time and name
it.

Collectives alone wait for a lost rank until their own timeout, and then cannot say which one it was. Here
every rank has a thread that writes a beat into the key-value store of torch.distributed and reads that of the
next rank: two keys a rank and interval, whatever the number of ranks. Who finds its neighbour silent writes a
verdict, which all read.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch.distributed as dist

from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.utils.format import first_line

LOST = 4
"""Exit code of a rank that leaves because another one was lost."""
ROUNDS = 6
"""Intervals without a new beat after which a rank counts as silent."""
SECONDS_TO_TELL = 5.0
"""Longest wait for the last words of a rank to be printed."""
PACKAGE = Path(__file__).resolve().parent


class Store(Protocol):
    """What is used of torch's key-value stores."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


class Heartbeat:
    """This rank's beat, and its eye on the next rank.

    Silence is counted in this rank's own rounds, not by a clock, so that a job that was suspended as a whole
    goes on.

    Args:
        rank, world_size: of this process in the whole job.
        timeout: seconds of silence after which a rank counts as lost.
        progress: this rank's kept steps completed; None before training.
        store: a connection of its own to the job's store: a thread that waits in one would hold up the
            others.
        leave: what ends the process; the main thread may be inside a collective that never returns.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout: float,
        progress: Callable[[], int | None],
        store: Store,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._progress, self._store, self._leave = progress, store, leave
        self._main_thread = threading.main_thread().ident
        self._ended = threading.Event()
        self._in_order = False
        self._rounds = 0
        self._silent = 0
        self._last: bytes | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._watcher = threading.Thread(target=self._watch_the_store, name="heartbeat-store", daemon=True)

    def start(self) -> None:
        self._beat()
        self._thread.start()
        self._watcher.start()

    def stop(self) -> None:
        """The run ends in an orderly way: the neighbours must not take the silence for a loss."""
        if not self._ended.is_set():
            self._in_order = True
            self._ended.set()
            if self._thread.is_alive():
                self._thread.join(
                    self.timeout
                )  # which says it, unless it waits for a store that is out of reach

    def explain(self, error: BaseException) -> str:
        """Who is lost, after a collective has failed on this rank; waits until silence tells, at most
        `timeout`.

        Returns:
            One sentence; about all ranks' places where none is silent, such as when one is stuck.
        """
        first = first_line(error)
        before = self._beats()
        self._ended.wait(self.timeout)
        after = self._beats()
        if after is None:
            return f"{self._here()}: {first}; {self._store_is_gone()}"
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        silent = [
            rank for rank in others if not _ended(after[rank]) and after[rank] == (before or after)[rank]
        ]
        if silent:
            return f"{self._here()}: {first}; lost: {'; '.join(_told(rank, after[rank]) for rank in silent)}"
        places = "; ".join(
            _told(rank, beat, with_place=True) for rank, beat in after.items() if not _ended(beat)
        )
        return f"{self._here()}: {first}; no rank is silent. {places}"

    def _run(self) -> None:
        interval = self.timeout / ROUNDS
        failures = 0
        while not self._ended.wait(interval):
            try:
                self._beat()
                verdict = self._look()
                failures = 0
            except RuntimeError:  # of torch.distributed: the store does not answer
                failures += 1
                verdict = self._store_is_gone() if failures >= ROUNDS // 2 else None
            if verdict and not self._ended.is_set():
                self._leave_with(verdict)
                return
        if self._in_order:
            with suppress(RuntimeError):  # the store's rank has ended first
                self._store.set(self._key(self.rank), json.dumps({"ended": True}))

    def _watch_the_store(self) -> None:
        """Leave when the other thread gets no answer: torch's client waits without end behind a cut link."""
        seen, waited = 0, 0
        while not self._ended.wait(self.timeout / ROUNDS):
            waited = waited + 1 if self._rounds == seen else 0
            seen = self._rounds
            if waited == ROUNDS and self._thread.is_alive():
                self._leave_with(self._store_is_gone())
                return

    def _leave_with(self, verdict: str) -> None:
        tell(f"error: {self._here()}: {verdict}")
        self._leave(LOST)

    def _beat(self) -> None:
        self._rounds += 1
        beat = {
            "round": self._rounds,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": self._progress(),
            "place": place_of(sys._current_frames().get(self._main_thread)),
        }
        self._store.set(self._key(self.rank), json.dumps(beat))

    def _look(self) -> str | None:
        """The verdict on who is lost: another rank's, or this one's on its neighbour."""
        verdict = "heartbeat/lost"
        if self._store.check([verdict]):
            return self._store.get(verdict).decode()
        neighbour = (self.rank + 1) % self.world_size
        key = self._key(neighbour)
        beat = self._store.get(key) if self._store.check([key]) else None
        # One that was never heard may be on its way yet: the time-out of collectives is for that.
        is_silent = beat is not None and beat == self._last and not _ended(beat)
        self._silent = self._silent + 1 if is_silent else 0
        self._last = beat
        if self._silent < ROUNDS:
            return None
        found = f"nothing was heard for {self.timeout:g} s from {_told(neighbour, beat)}"
        self._store.set(verdict, found)
        return found

    def _beats(self) -> dict[int, bytes | None] | None:
        """The last beat of every rank, None for one that never came up; None: the store does not answer."""
        try:
            keys = {rank: self._key(rank) for rank in range(self.world_size)}
            return {
                rank: self._store.get(key) if self._store.check([key]) else None for rank, key in keys.items()
            }
        except RuntimeError:
            return None

    def _key(self, rank: int) -> str:
        return f"heartbeat/{rank}"

    def _here(self) -> str:
        step = self._progress()
        when = "before training" if step is None else f"at step {step}"
        return f"rank {self.rank} on {socket.gethostname()} leaves {when}"

    def _store_is_gone(self) -> str:
        knows = self._last is not None and not _ended(self._last) and (self.rank + 1) % self.world_size == 0
        return store_is_gone(_told(0, self._last) if knows else "rank 0")


@contextmanager
def rendezvous_errors() -> Iterator[None]:
    """Join the process group. Where the ranks do not find each other, that is told and the process ends with
    `LOST`."""
    try:
        yield
    except RuntimeError as error:
        if not is_failed_collective(error):
            raise
        rank, world_size = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE"))
        tell(
            f"error: rank {rank} on {socket.gethostname()} did not find all {world_size} ranks at "
            f"{_address()}: "
            f"{first_line(error)}"
        )
        os._exit(LOST)


@contextmanager
def heartbeat_monitor(
    mesh: ProcessMesh, attempt: str, timeout: float, progress: Callable[[], int | None]
) -> Iterator[None]:
    """Build and train under a heartbeat. Nothing is watched where there is one rank, or where `timeout` is 0.

    When a collective fails, what is known about the other ranks is printed, and the process ends with `LOST`;
    so it does when the store is out of reach from the beginning.

    Args:
        attempt: what `init_distributed` returned: the store may still hold beats of an earlier attempt.
        timeout, progress: as of `Heartbeat`.
    """
    if mesh.world_size == 1 or not timeout:
        yield
        return
    try:
        store = dist.PrefixStore(attempt, connect(timeout))
        heartbeat = Heartbeat(mesh.rank, mesh.world_size, timeout, progress, store)
        heartbeat.start()
    except RuntimeError:
        tell(f"error: rank {mesh.rank} on {socket.gethostname()}: {store_is_gone('rank 0')}")
        os._exit(LOST)
    try:
        yield
    except RuntimeError as error:
        if not is_failed_collective(error):
            raise
        tell(f"error: {heartbeat.explain(error)}")
        # Not through the interpreter's end: destructors of the process group would wait for the lost rank.
        os._exit(LOST)
    finally:
        heartbeat.stop()


def store_is_gone(server: str) -> str:
    """The verdict on the rank that serves the store: it cannot be told from its host, nor that from the
    network."""
    return f"{server}, its host or the link to it is lost: the store at {_address()} does not answer"


def tell(message: str) -> None:
    """Print to standard error, but wait for nobody to read it: what it leads to may be behind the cut
    link."""

    def write() -> None:
        with suppress(OSError):
            print(message, file=sys.stderr, flush=True)

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    writing.join(SECONDS_TO_TELL)


def is_failed_collective(error: RuntimeError) -> bool:
    """Whether it is the process group that failed: torch's own types, or gloo's words."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "Connection closed by peer" in text


def connect(timeout: float) -> dist.TCPStore:
    """A connection of its own to the store that the launcher or rank 0 serves.

    Raises:
        RuntimeError: of torch.distributed, when nothing answers within `timeout` seconds.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout))


def place_of(frame: FrameType | None) -> str:
    """Where a thread stands: its innermost function, and the innermost one of this package that led there."""
    inner = None
    while frame is not None:
        code = frame.f_code
        file = Path(code.co_filename)
        here = f"{code.co_name} ({file.name}:{frame.f_lineno})"
        inner = inner or here
        if PACKAGE in file.parents:
            return here if here == inner else f"{inner}, called from {here}"
        frame = frame.f_back
    return inner or "an unknown place"


def _address() -> str:
    """Of the store."""
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _ended(beat: bytes | None) -> bool:
    return beat is not None and bool(json.loads(beat).get("ended"))


def _told(rank: int, beat: bytes | None, with_place: bool = False) -> str:
    if beat is None:
        return f"rank {rank}, which never came up"
    told = json.loads(beat)
    step = "not training yet" if told["step"] is None else f"step {told['step']}"
    place = f", in {told['place']}" if with_place else ""
    return f"rank {rank} on {told['host']} (process {told['pid']}, {step}{place})"
