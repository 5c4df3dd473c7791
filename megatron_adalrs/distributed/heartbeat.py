"""Heartbeats between ranks: when a rank dies or stops, the others name it and exit within a bounded time.

Collectives alone wait for a lost rank until their own timeout, and then cannot say which rank it was. Here
every rank has a thread that writes a beat into the key-value store of torch.distributed and reads the beat of
the next rank, which makes two keys per rank and interval for any number of ranks. A rank whose next rank is
silent writes this finding into the store, where all ranks read it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.distributed.rendezvous import (
    LOST,
    Store,
    connect,
    is_failed_collective,
    print_error,
    store_address,
)
from megatron_adalrs.utils.format import first_line

ROUNDS = 6
"""Intervals without a new beat after which a rank counts as lost."""
_PACKAGE = Path(__file__).resolve().parents[1]
_LOST_RANK = "heartbeat/lost"
"""Key of the finding that a rank is lost."""


class Heartbeat:
    """Heartbeat of this rank, and its check of the next rank's.

    Silence is counted in this rank's own rounds and not by a clock, so that a job that was suspended as a
    whole continues.

    Args:
        rank: Rank of this process.
        world_size: Number of ranks of the job.
        timeout: Seconds of silence after which a rank counts as lost.
        progress: Returns the number of kept steps that this rank has completed; None before training.
        store: A connection to the job's store that no other thread uses, because a call that waits blocks
            the connection.
        leave: Ends the process with an exit code. The main thread cannot do it: it may be inside a
            collective that never returns.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout: float,
        progress: Callable[[], int | None],
        store: Store,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self._progress = progress
        self._store = store
        self._leave = leave
        self._main_thread = threading.main_thread()
        self._ended = threading.Event()
        self._rounds = 0
        self._silent_rounds = 0
        self._store_failures = 0
        self._last_beat: bytes | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._watcher = threading.Thread(target=self._watch_store, name="heartbeat-store", daemon=True)

    def start(self) -> None:
        """Send the first beat and start the threads.

        Raises:
            RuntimeError: The store does not answer.
        """
        self._beat()
        self._thread.start()
        self._watcher.start()

    def stop(self) -> None:
        """End the heartbeat and announce it, so that the silence is not taken for a loss.

        A store that does not answer is waited for at most `timeout` seconds.
        """
        if not self._ended.is_set():
            self._ended.set()
            if self._thread.is_alive():
                self._thread.join(self.timeout)  # the thread announces it

    def explain(self, error: BaseException) -> str:
        """Find out which ranks are lost after a collective has failed on this rank; takes `timeout` seconds.

        Returns:
            One sentence with the error and the lost ranks or, if none is lost, the function that every rank
            is in.
        """
        failure = f"{self._exit_text()}: {first_line(error)}"
        before = self._read_beats()
        self._ended.wait(self.timeout)
        after = self._read_beats()
        if after is None:
            return f"{failure}; {self._store_error()}"
        running = {rank: beat for rank, beat in after.items() if not _has_ended(beat)}
        lost = [
            rank for rank, beat in running.items() if rank != self.rank and beat == (before or after)[rank]
        ]
        if lost:
            return f"{failure}; lost: {'; '.join(_describe(rank, after[rank]) for rank in lost)}"
        places = "; ".join(_describe(rank, beat, with_place=True) for rank, beat in running.items())
        return f"{failure}; all ranks still send heartbeats: {places}"

    def run_round(self) -> bool:
        """Send a beat, check the next rank, and exit if a rank or the store is lost.

        Returns:
            Whether `leave` was called.
        """
        try:
            self._beat()
            lost = self._find_lost_rank()
            self._store_failures = 0
        except RuntimeError:  # raised by torch.distributed: the store does not answer
            self._store_failures += 1
            lost = self._store_error() if self._store_failures >= ROUNDS // 2 else None
        if lost is None or self._ended.is_set():
            return False
        self._exit(lost)
        return True

    def _run(self) -> None:
        while not self._ended.wait(self.timeout / ROUNDS):
            if self.run_round():
                return
        with suppress(RuntimeError):  # the rank that serves the store may have ended first
            self._store.set(self._key(self.rank), json.dumps({"ended": True}))

    def _watch_store(self) -> None:
        """Exit if the other thread makes no progress: torch's client waits forever behind a broken link."""
        last_round, waited = 0, 0
        while not self._ended.wait(self.timeout / ROUNDS):
            waited = waited + 1 if self._rounds == last_round else 0
            last_round = self._rounds
            if waited == ROUNDS and self._thread.is_alive():
                self._exit(self._store_error())
                return

    def _exit(self, reason: str) -> None:
        print_error(f"{self._exit_text()}: {reason}")
        self._leave(LOST)

    def _beat(self) -> None:
        self._rounds += 1
        frame = sys._current_frames().get(self._main_thread.ident or 0)
        beat = {
            "round": self._rounds,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": self._progress(),
            "place": current_function(frame),
        }
        self._store.set(self._key(self.rank), json.dumps(beat))

    def _find_lost_rank(self) -> str | None:
        """Return the finding of another rank, or this rank's own on the next rank; None if none is lost."""
        if self._store.check([_LOST_RANK]):
            return self._store.get(_LOST_RANK).decode()
        following = (self.rank + 1) % self.world_size
        beat = self._read_beat(following)
        # A rank without any beat may not have started yet: the timeout of collectives covers this case.
        is_silent = beat is not None and beat == self._last_beat and not _has_ended(beat)
        self._silent_rounds = self._silent_rounds + 1 if is_silent else 0
        self._last_beat = beat
        if self._silent_rounds < ROUNDS:
            return None
        finding = f"no heartbeat for {self.timeout:g} s from {_describe(following, beat)}"
        self._store.set(_LOST_RANK, finding)
        return finding

    def _read_beats(self) -> dict[int, bytes | None] | None:
        """Return the last beat of every rank, None for ranks without one; None if the store is lost."""
        try:
            return {rank: self._read_beat(rank) for rank in range(self.world_size)}
        except RuntimeError:
            return None

    def _read_beat(self, rank: int) -> bytes | None:
        key = self._key(rank)
        return self._store.get(key) if self._store.check([key]) else None

    def _key(self, rank: int) -> str:
        return f"heartbeat/{rank}"

    def _exit_text(self) -> str:
        step = self._progress()
        when = "before training" if step is None else f"at step {step}"
        return f"rank {self.rank} on {socket.gethostname()} exits {when}"

    def _store_error(self) -> str:
        """Return a message that names the host of the first rank if this rank has a beat of it."""
        follows = (self.rank + 1) % self.world_size == 0
        is_known = follows and self._last_beat is not None and not _has_ended(self._last_beat)
        return store_error(_describe(0, self._last_beat) if is_known else "rank 0")


@contextmanager
def heartbeat_monitor(
    mesh: ProcessMesh, attempt: str, timeout: float, progress: Callable[[], int | None]
) -> Iterator[None]:
    """Run a heartbeat while the context is open, unless there is one rank only or `timeout` is 0.

    If a collective fails in the context, or the store does not answer at its start, print what is known about
    the other ranks and exit with code `LOST`.

    Args:
        mesh: The ranks.
        attempt: Name of the attempt, see `rendezvous`: the store may hold beats of an earlier attempt.
        timeout: See `Heartbeat`.
        progress: See `Heartbeat`.
    """
    if mesh.world_size == 1 or not timeout:
        yield
        return
    try:
        heartbeat = Heartbeat(mesh.rank, mesh.world_size, timeout, progress, connect(attempt, timeout))
        heartbeat.start()
    except RuntimeError:
        print_error(f"rank {mesh.rank} on {socket.gethostname()}: {store_error('rank 0')}")
        os._exit(LOST)
    try:
        yield
    except RuntimeError as error:
        if not is_failed_collective(error):
            raise
        print_error(heartbeat.explain(error))
        # While an interpreter is finalized, destructors of the process group wait for the lost rank.
        os._exit(LOST)
    finally:
        heartbeat.stop()


def store_error(server: str) -> str:
    """Return the message about a lost store. Whether its rank, host or network failed cannot be known."""
    return f"{server}, its host or the link to it is lost: the store at {store_address()} does not answer"


def current_function(frame: FrameType | None) -> str:
    """Return the innermost function of a thread, and the function of this package that has called it."""
    innermost = None
    while frame is not None:
        code = frame.f_code
        file = Path(code.co_filename)
        place = f"{code.co_name} ({file.name}:{frame.f_lineno})"
        innermost = innermost or place
        if _PACKAGE in file.parents:
            return place if place == innermost else f"{innermost}, called from {place}"
        frame = frame.f_back
    return innermost or "an unknown function"


def _has_ended(beat: bytes | None) -> bool:
    return beat is not None and bool(json.loads(beat).get("ended"))


def _describe(rank: int, beat: bytes | None, with_place: bool = False) -> str:
    if beat is None:
        return f"rank {rank}, which has not started"
    content = json.loads(beat)
    step = "not training yet" if content["step"] is None else f"step {content['step']}"
    place = f", in {content['place']}" if with_place else ""
    return f"rank {rank} on {content['host']} (process {content['pid']}, {step}{place})"
