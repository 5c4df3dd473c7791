"""Ranks that watch each other: a rank that dies or stands still is named by the others within a bounded
time."""

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
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_adalrs.distributed.heartbeat import (
    LOST,
    ROUNDS,
    Heartbeat,
    is_failed_collective,
    place_of,
    tell,
)
from megatron_adalrs.distributed.local_ranks import free_port, start_rank
from tests.data.corpora import counting_corpus

TIMEOUT = 0.3


class Job:
    """Heartbeats of several ranks in one process, on one store."""

    def __init__(self, ranks: int) -> None:
        patience = timedelta(seconds=10)
        self.server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=patience, wait_for_workers=False)
        self.left: dict[int, int] = {}
        self.beats = [self.beat(rank, ranks) for rank in range(ranks)]

    def beat(self, rank: int, ranks: int) -> Heartbeat:
        store = dist.TCPStore("127.0.0.1", self.server.port, is_master=False, timeout=timedelta(seconds=10))
        return Heartbeat(rank, ranks, TIMEOUT, lambda: 7, store, lambda code: self.left.update({rank: code}))

    def freeze(self, rank: int) -> None:
        """As if its process had stopped: no more beats, no orderly end."""
        self.beats[rank]._ended.set()


@pytest.fixture
def job() -> Iterator[Job]:
    job = Job(3)
    yield job
    for beat in job.beats:
        beat.stop()


def waited(condition: Callable[[], bool], seconds: float = 10 * TIMEOUT) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_the_others_leave_when_a_rank_falls_silent(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    for beat in job.beats:
        beat.start()
    assert not waited(lambda: bool(job.left), 2 * TIMEOUT)
    job.freeze(1)
    assert waited(lambda: set(job.left) == {0, 2})
    assert set(job.left.values()) == {LOST}
    told = capfd.readouterr().err
    assert re.search(
        r"rank 0 on \S+ leaves at step 7: nothing was heard for 0.3 s from rank 1 on \S+ \(process", told
    )
    assert re.search(r"rank 2 on \S+ leaves at step 7: .* from rank 1 on ", told)


def test_a_rank_that_ends_in_order_is_not_missed(job: Job) -> None:
    for beat in job.beats:
        beat.start()
    time.sleep(TIMEOUT)
    for beat in job.beats[1:]:
        beat.stop()
    assert not waited(lambda: bool(job.left), 3 * TIMEOUT)


def test_a_rank_that_takes_long_to_begin_is_waited_for_but_named_when_a_collective_fails(job: Job) -> None:
    job.beats[0].start()
    job.beats[2].start()
    assert not waited(lambda: bool(job.left), 3 * TIMEOUT)
    told = job.beats[0].explain(RuntimeError("Timed out waiting 600000ms for recv operation to complete"))
    assert told.endswith("; lost: rank 1, which never came up")


def test_a_lost_store_is_a_lost_first_rank(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    class Gone:
        def check(self, *_: str) -> bool:
            raise dist.DistNetworkError("connection reset")

        set = get = check

    job.beats[2].start()
    job.beats[2]._store = Gone()
    assert waited(lambda: job.left == {2: LOST})
    told = capfd.readouterr().err
    assert re.search(
        r"rank 2 on \S+ leaves at step 7: rank 0, its host or the link to it is lost: the store at ", told
    )


class Silent:
    """A store behind a cut link, whose client waits for an answer without end."""

    def __init__(self, store: dist.TCPStore) -> None:
        self._store, self.is_cut = store, False
        self.was_asked, self.mended = threading.Event(), threading.Event()

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        return self._store.get(key)

    def check(self, keys: list[str]) -> bool:
        if self.is_cut:
            self.was_asked.set()
            self.mended.wait(60)
        return self._store.check(keys)


def test_a_rank_whose_store_keeps_it_waiting_leaves(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    beat = job.beats[2]
    store = beat._store = Silent(beat._store)
    for other in job.beats:
        other.start()
    assert waited(lambda: beat._last is not None)
    store.is_cut = True
    assert waited(lambda: job.left.get(2) == LOST)
    told = capfd.readouterr().err
    assert re.search(
        r"rank 2 .* rank 0 on \S+ \(process \d+, step 7\), its host or the link to it is lost: the", told
    )
    store.mended.set()


def test_a_run_that_ends_does_not_wait_for_a_store_that_keeps_it_waiting(job: Job) -> None:
    beat = job.beats[2]
    store = beat._store = Silent(beat._store)
    beat.start()
    store.is_cut = True
    assert store.was_asked.wait(10 * TIMEOUT)
    started = time.monotonic()
    beat.stop()
    assert time.monotonic() - started < 30
    assert job.left == {}
    store.mended.set()


def test_nothing_overwrites_the_word_that_a_rank_has_ended_in_order(job: Job) -> None:
    """Its thread may be in the middle of a round when it ends."""
    beat = job.beats[1]
    store = beat._store = Silent(beat._store)
    beat.start()
    store.is_cut = True
    assert store.was_asked.wait(10 * TIMEOUT)
    threading.Timer(TIMEOUT / 2, store.mended.set).start()
    beat.stop()
    assert waited(lambda: json.loads(store.get(beat._key(1))) == {"ended": True})


@pytest.mark.parametrize("reader_is_there", [True, False])
def test_last_words_are_not_waited_for(monkeypatch: pytest.MonkeyPatch, reader_is_there: bool) -> None:
    """Whether nobody reads them, as behind a cut link, or the launcher is gone."""
    reader, writer = os.pipe()
    if reader_is_there:
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"0" * 4096)
        os.set_blocking(writer, True)
    else:
        os.close(reader)
    monkeypatch.setattr("megatron_adalrs.distributed.heartbeat.SECONDS_TO_TELL", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", os.fdopen(writer, "w", closefd=False))
        started = time.monotonic()
        tell("error: rank 1 is lost")
        assert time.monotonic() - started < 10
    if reader_is_there:
        os.close(reader)


def test_after_a_failed_collective_who_is_silent_is_named_and_otherwise_where_all_are(job: Job) -> None:
    for beat in job.beats:
        beat.start()
    time.sleep(TIMEOUT)
    error = RuntimeError("Timed out waiting 600000ms for recv operation to complete")
    told = job.beats[0].explain(error)
    assert told.startswith("rank 0 on ") and "Timed out waiting" in told and "no rank is silent" in told
    assert all(re.search(rf"rank {rank} on \S+ \(process \d+, step 7, in \S+ \(", told) for rank in range(3))
    job.freeze(2)
    assert waited(lambda: not job.beats[2]._thread.is_alive())
    assert re.search(r"; lost: rank 2 on \S+ \(process \d+, step 7\)$", job.beats[0].explain(error))


def test_silence_is_counted_in_own_rounds(job: Job) -> None:
    """A job that was suspended as a whole goes on, however long it slept."""
    watcher = job.beats[0]
    job.beats[1]._beat()
    for _ in range(ROUNDS):
        watcher._beat()
        assert watcher._look() is None
    watcher._beat()
    assert "rank 1" in (watcher._look() or "")


def test_only_failures_of_the_process_group_are_about_other_ranks() -> None:
    assert is_failed_collective(dist.DistBackendError("NCCL error"))
    assert is_failed_collective(RuntimeError("[gloo/transport/tcp/pair.cc:549] Connection closed by peer"))
    assert not is_failed_collective(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_place_is_the_innermost_function_and_the_one_of_ours_that_led_there() -> None:
    entered, leave = threading.Event(), threading.Event()

    def stuck() -> None:
        entered.set()
        leave.wait()

    thread = threading.Thread(target=stuck)
    thread.start()
    entered.wait()
    place = place_of(sys._current_frames()[thread.ident])
    leave.set()
    thread.join()
    assert re.match(r"wait \(threading.py:\d+\)", place)
    assert place_of(None) == "an unknown place"


def trained(flags: list[str], told: str, dies_in: str | None = None) -> int:
    """pretrain_gpt.py as one of two ranks, in this process; what it says on stderr goes into a file.

    Args:
        dies_in: function of megatron_adalrs.training.build in which this process is killed.
    """
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{told}.{name}", os.O_WRONLY | os.O_CREAT), stream)
    import pretrain_gpt
    from megatron_adalrs.training import build

    if dies_in:
        setattr(build, dies_in, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    sys.argv = ["pretrain_gpt.py", *flags]
    return pretrain_gpt.main()


class RealRanks:
    """Two real ranks, without a launcher that would notice, as when each is on another node."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, self.port = folder, free_port()
        values = {
            "preset": "llama-tiny",
            "num_layers": 1,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "seq_length": 16,
            "vocab_size": 50,
            "data_path": counting_corpus(folder / "counting"),
            "split": "8,1,1",
            "lr": 1e-3,
            "micro_batch_size": 1,
            "train_iters": 100_000,
            "log_interval": 10,
            "run_dir": folder / "run",
            "heartbeat_timeout": 3,
        } | changes
        self.flags = [
            text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))
        ]
        self.processes: list[Any] = []

    def start(self, rank: int, dies_in: str | None = None) -> Any:
        told = str(self.folder / f"rank{rank}")
        process = start_rank(rank, 2, self.port, trained, self.flags, told, dies_in, accelerator="cpu")
        self.processes.append(process)
        return process

    def told(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.err").read_text()


@pytest.fixture
def real_ranks(tmp_path: Path) -> Iterator[Callable[..., RealRanks]]:
    jobs: list[RealRanks] = []

    def make(**changes: Any) -> RealRanks:
        jobs.append(RealRanks(tmp_path, **changes))
        return jobs[-1]

    yield make
    for process in (process for job in jobs for process in job.processes):
        process.kill()
        process.join()


@pytest.mark.parametrize("signal_sent", [signal.SIGSTOP, signal.SIGKILL], ids=lambda s: s.name)
def test_a_real_rank_that_stops_or_dies_is_named_by_the_other(
    real_ranks: Callable[..., RealRanks], signal_sent: signal.Signals
) -> None:
    job = real_ranks()
    first, second = job.start(0), job.start(1)
    steps = job.folder / "run" / "metrics.jsonl"
    assert waited(lambda: steps.exists() and steps.read_text().count('"train"') > 20, 120)
    time.sleep(3 * 3 / ROUNDS)  # its last beats are of training
    os.kill(second.pid, signal_sent)
    first.join(30)
    assert first.exitcode == LOST
    told = job.told(0)
    assert re.search(
        rf"rank 0 on \S+ leaves at step \d+: .*rank 1 on \S+ \(process {second.pid}, step \d+", told
    )
    assert "Traceback" not in told


@pytest.mark.parametrize("place", ["build_datasets", "build_engine"])
def test_a_rank_that_dies_before_training_is_named_too(
    real_ranks: Callable[..., RealRanks], place: str
) -> None:
    job = real_ranks()
    first, second = job.start(0), job.start(1, dies_in=place)
    first.join(60)
    assert first.exitcode == LOST
    told = job.told(0)
    assert re.search(
        rf"^error: rank 0 on \S+ leaves before training: .*rank 1 on \S+ \(process {second.pid}, not "
        rf"training yet\)",
        told,
        re.MULTILINE,
    )
    assert "Traceback" not in told


def test_ranks_that_never_meet_say_where_they_waited(real_ranks: Callable[..., RealRanks]) -> None:
    job = real_ranks(distributed_timeout_minutes=0.05)
    first = job.start(0)
    first.join(60)
    assert first.exitcode == LOST
    told = job.told(0)
    assert re.search(
        rf"^error: rank 0 on \S+ did not find all 2 ranks at 127.0.0.1:{job.port}: ", told, re.MULTILINE
    )
    assert "Traceback" not in told
