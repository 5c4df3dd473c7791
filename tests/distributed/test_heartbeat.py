"""Heartbeats: ranks name one that dies or stops, and exit within a bounded time."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch.distributed as dist

from megatron_adalrs.distributed.heartbeat import ROUNDS, Heartbeat, current_function
from megatron_adalrs.distributed.local_ranks import free_port, start_rank
from megatron_adalrs.distributed.rendezvous import LOST, is_failed_collective, print_error
from tests.data.corpora import counting_corpus
from tests.helpers.settings import ONE_LAYER

TIMEOUT = 0.3
PATIENCE = 60.0
FAILURE = RuntimeError("Timed out waiting 600000ms for recv operation to complete")


class FaultyStore:
    """A rank's connection to the store, which a test can break."""

    def __init__(self, store: dist.TCPStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._written = threading.Condition(self._lock)
        self._drops_writes = False
        self._is_gone = False
        self._connected = threading.Event()
        self._connected.set()
        self._values: dict[str, str] = {}
        self.has_read = threading.Event()
        self.is_waiting = threading.Event()

    def drop_writes(self) -> None:
        """Ignore writes from now on: for the other ranks, this rank has stopped."""
        with self._lock:
            self._drops_writes = True

    def disappear(self) -> None:
        """Fail all calls from now on, as if the process that serves the store had died."""
        self._is_gone = True

    def cut(self) -> None:
        """Let all reads wait from now on, as behind a broken network link."""
        self._connected.clear()

    def mend(self) -> None:
        self._connected.set()

    def wait_for(self, key: str, value: dict[str, Any]) -> bool:
        """Wait until `value` is what was last written to `key`."""
        text = json.dumps(value)
        with self._written:
            return self._written.wait_for(lambda: self._values.get(key) == text, PATIENCE)

    def set(self, key: str, value: str) -> None:
        self._check_server()
        with self._written:
            if not self._drops_writes:
                self._store.set(key, value)
                self._values[key] = value
                self._written.notify_all()

    def get(self, key: str) -> bytes:
        self._check_server()
        value = self._store.get(key)
        self.has_read.set()
        return value

    def check(self, keys: list[str]) -> bool:
        self._check_server()
        if not self._connected.is_set():
            self.is_waiting.set()
            self._connected.wait(PATIENCE)
        return self._store.check(keys)

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        self._store.wait(keys, timeout)

    def _check_server(self) -> None:
        if self._is_gone:
            raise dist.DistNetworkError("connection reset")


class Job:
    """Heartbeats of several ranks in one process, on one store."""

    def __init__(self, ranks: int) -> None:
        patience = timedelta(seconds=10)
        self.server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=patience, wait_for_workers=False)
        self._left: dict[int, int] = {}
        self._changed = threading.Condition()
        self.stores = [
            FaultyStore(dist.TCPStore("127.0.0.1", self.server.port, is_master=False, timeout=patience))
            for _ in range(ranks)
        ]
        self.beats = [
            Heartbeat(rank, ranks, TIMEOUT, lambda: 7, store, self._leave_function(rank))
            for rank, store in enumerate(self.stores)
        ]

    def run_rounds(self, count: int, *ranks: int) -> None:
        """Run rounds of some ranks in this thread; a rank that has left runs no more."""
        for _ in range(count):
            for rank in ranks:
                if rank not in self._left:
                    self.beats[rank].run_round()

    def left(self) -> dict[int, int]:
        """Return the exit codes of the ranks that have left."""
        with self._changed:
            return dict(self._left)

    def wait_for_left(self, *ranks: int) -> bool:
        """Wait until these ranks have left because of a loss."""
        with self._changed:
            return self._changed.wait_for(
                lambda: all(self._left.get(rank) == LOST for rank in ranks), PATIENCE
            )

    def _leave_function(self, rank: int) -> Callable[[int], None]:
        def leave(code: int) -> None:
            with self._changed:
                self._left[rank] = code
                self._changed.notify_all()

        return leave


@pytest.fixture
def job() -> Iterator[Job]:
    job = Job(3)
    yield job
    for store in job.stores:
        store.mend()
    for beat in job.beats:
        beat.stop()


def test_others_leave_when_a_rank_stops(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    job.run_rounds(3 * ROUNDS, 0, 1, 2)
    assert job.left() == {}
    job.run_rounds(2 * ROUNDS, 0, 2)
    assert job.left() == {0: LOST, 2: LOST}
    printed = capfd.readouterr().err
    assert re.search(
        r"rank 0 on \S+ exits at step 7: no heartbeat for 0.3 s from rank 1 on \S+ \(process", printed
    )
    assert re.search(r"rank 2 on \S+ exits at step 7: .* from rank 1 on ", printed)


def test_threads_notice_a_rank_that_stops(job: Job) -> None:
    for beat in job.beats:
        beat.start()
    assert job.left() == {}
    job.stores[1].drop_writes()
    assert job.wait_for_left(0, 2)


def test_a_rank_that_has_ended_is_not_lost(job: Job) -> None:
    for beat in job.beats[1:]:
        beat.start()
    job.run_rounds(3, 0)
    for beat in job.beats[1:]:
        beat.stop()
    job.run_rounds(3 * ROUNDS, 0)
    assert job.left() == {}


def test_a_rank_that_has_not_started_is_waited_for(job: Job) -> None:
    job.run_rounds(3 * ROUNDS, 0, 2)
    assert job.left() == {}
    job.beats[0].start()
    job.beats[2].start()
    assert job.beats[0].explain(FAILURE).endswith("; lost: rank 1, which has not started")


def test_a_lost_store_is_a_lost_first_rank(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    job.run_rounds(1, 2)
    job.stores[2].disappear()
    job.run_rounds(ROUNDS, 2)
    assert job.left() == {2: LOST}
    assert re.search(
        r"rank 2 on \S+ exits at step 7: rank 0, its host or the link to it is lost: the store at ",
        capfd.readouterr().err,
    )


def test_a_rank_behind_a_broken_link_leaves(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    for beat in job.beats:
        beat.start()
    assert job.stores[2].has_read.wait(PATIENCE)
    job.stores[2].cut()
    assert job.wait_for_left(2)
    assert re.search(
        r"rank 2 .* rank 0 on \S+ \(process \d+, step 7\), its host or the link to it is lost: the",
        capfd.readouterr().err,
    )


def test_stopping_does_not_wait_for_a_broken_link(job: Job) -> None:
    job.stores[2].cut()
    job.beats[2].start()
    assert job.stores[2].is_waiting.wait(PATIENCE)
    started = time.monotonic()
    job.beats[2].stop()
    assert time.monotonic() - started < 30
    assert job.left() == {}


def test_a_late_round_keeps_the_announced_end(job: Job) -> None:
    """The thread may be in the middle of a round when the heartbeat ends."""
    job.stores[1].cut()
    job.beats[1].start()
    assert job.stores[1].is_waiting.wait(PATIENCE)
    job.beats[1].stop()
    job.stores[1].mend()
    assert job.stores[1].wait_for("heartbeat/1", {"ended": True})
    assert job.server.get("heartbeat/1") == b'{"ended": true}'


@pytest.mark.parametrize("has_reader", [True, False])
def test_printing_an_error_does_not_wait(monkeypatch: pytest.MonkeyPatch, has_reader: bool) -> None:
    """The reader of the output may be behind a broken link, or the launcher may have died."""
    reader, writer = os.pipe()
    if has_reader:
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"0" * 4096)
        os.set_blocking(writer, True)
    else:
        os.close(reader)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", os.fdopen(writer, "w", closefd=False))
        started = time.monotonic()
        print_error("rank 1 is lost", timeout=0.2)
        assert time.monotonic() - started < 10
    if has_reader:
        os.close(reader)


def test_a_failed_collective_names_the_lost_rank(job: Job) -> None:
    for beat in job.beats:
        beat.start()
    text = job.beats[0].explain(FAILURE)
    assert text.startswith("rank 0 on ") and "Timed out waiting" in text
    assert "all ranks still send heartbeats" in text
    assert all(re.search(rf"rank {rank} on \S+ \(process \d+, step 7, in \S+ \(", text) for rank in range(3))
    job.stores[2].drop_writes()
    assert re.search(r"; lost: rank 2 on \S+ \(process \d+, step 7\)$", job.beats[0].explain(FAILURE))


def test_silence_is_counted_in_own_rounds(job: Job) -> None:
    """A job that was suspended as a whole continues, however long it was suspended."""
    job.run_rounds(1, 1)
    job.run_rounds(ROUNDS, 0)
    assert job.left() == {}
    job.run_rounds(1, 0)
    assert job.left() == {0: LOST}


def test_only_errors_of_the_process_group_count() -> None:
    assert is_failed_collective(dist.DistBackendError("NCCL error"))
    assert is_failed_collective(RuntimeError("[gloo/transport/tcp/pair.cc:549] Connection closed by peer"))
    assert not is_failed_collective(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_the_current_function_is_the_innermost() -> None:
    entered, leave = threading.Event(), threading.Event()

    def stuck() -> None:
        entered.set()
        leave.wait()

    thread = threading.Thread(target=stuck)
    thread.start()
    entered.wait()
    place = current_function(sys._current_frames()[thread.ident])
    leave.set()
    thread.join()
    assert re.match(r"wait \(threading.py:\d+\)", place)
    assert current_function(None) == "an unknown function"


def pretrain(flags: list[str], output: Connection, errors: str, dies_in: str | None) -> int:
    """Run pretrain_gpt.py as one rank in this process.

    Args:
        flags: Its command line.
        output: Pipe for its standard output.
        errors: File for its standard error.
        dies_in: Name of a function; this process kills itself when it calls it.
    """
    os.dup2(output.fileno(), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    import pretrain_gpt

    def die(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name == dies_in:
            os.kill(os.getpid(), signal.SIGKILL)

    if dies_in:
        sys.setprofile(die)
    sys.argv = ["pretrain_gpt.py", *flags]
    return pretrain_gpt.main()


class RealRanks:
    """Two ranks without a launcher that would notice the loss of one, as on two nodes."""

    timeout = 3.0

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        self.port = free_port()
        values = {
            "preset": "llama-tiny",
            **ONE_LAYER,
            "vocab_size": 50,
            "data_path": counting_corpus(folder / "counting"),
            "split": "8,1,1",
            "lr": 1e-3,
            "micro_batch_size": 1,
            "train_iters": 100_000,
            "log_interval": 10,
            "run_dir": folder / "run",
            "heartbeat_timeout": self.timeout,
        } | changes
        self.flags = [
            text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))
        ]
        self.processes: list[BaseProcess] = []
        self.outputs: list[Connection] = []

    def start(self, rank: int, dies_in: str | None = None) -> BaseProcess:
        reader, writer = Pipe(duplex=False)
        errors = str(self.folder / f"rank{rank}.err")
        process = start_rank(
            rank, 2, self.port, pretrain, self.flags, writer, errors, dies_in, accelerator="cpu"
        )
        writer.close()
        self.processes.append(process)
        self.outputs.append(reader)
        return process

    def train_for(self, seconds: float) -> None:
        """Read the output of the first rank until it has trained for some seconds."""
        started = None
        with os.fdopen(os.dup(self.outputs[0].fileno())) as lines:
            for line in lines:
                if "| loss " in line:
                    started = started or time.monotonic()
                    if time.monotonic() - started > seconds:
                        return
        raise AssertionError(f"the first rank has ended: {self.errors(0)}")

    def errors(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.err").read_text()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for output in self.outputs:
            output.close()


@pytest.fixture
def real_ranks(tmp_path: Path) -> Iterator[Callable[..., RealRanks]]:
    jobs: list[RealRanks] = []

    def make(**changes: Any) -> RealRanks:
        jobs.append(RealRanks(tmp_path, **changes))
        return jobs[-1]

    yield make
    for job in jobs:
        job.close()


@pytest.mark.parametrize("signal_sent", [signal.SIGSTOP, signal.SIGKILL], ids=lambda s: s.name)
def test_a_real_rank_that_stops_or_dies_is_named(
    real_ranks: Callable[..., RealRanks], signal_sent: signal.Signals
) -> None:
    job = real_ranks()
    first, second = job.start(0), job.start(1)
    job.train_for(3 * job.timeout / ROUNDS)  # until the last beats have a step
    os.kill(second.pid, signal_sent)
    first.join(30)
    assert first.exitcode == LOST
    errors = job.errors(0)
    assert re.search(
        rf"rank 0 on \S+ exits at step \d+: .*rank 1 on \S+ \(process {second.pid}, step \d+", errors
    )
    assert "Traceback" not in errors


@pytest.mark.parametrize("function", ["build_data", "build_engine"])
def test_a_rank_that_dies_before_training_is_named(
    real_ranks: Callable[..., RealRanks], function: str
) -> None:
    job = real_ranks()
    first, second = job.start(0), job.start(1, dies_in=function)
    first.join(60)
    assert first.exitcode == LOST
    errors = job.errors(0)
    assert re.search(
        rf"^error: rank 0 on \S+ exits before training: .*rank 1 on \S+ \(process {second.pid}, not "
        rf"training yet\)",
        errors,
        re.MULTILINE,
    )
    assert "Traceback" not in errors


def test_a_missing_rank_is_reported_with_the_address(real_ranks: Callable[..., RealRanks]) -> None:
    job = real_ranks(distributed_timeout_minutes=0.05)
    first = job.start(0)
    first.join(60)
    assert first.exitcode == LOST
    errors = job.errors(0)
    assert re.search(
        rf"^error: rank 0 on \S+ did not find all 2 ranks at 127.0.0.1:{job.port}: ", errors, re.MULTILINE
    )
    assert "Traceback" not in errors
