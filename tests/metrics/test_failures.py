"""A place that cannot be written costs the records there, and nothing else."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.metrics import ConsoleSink, JsonLines, Metrics, open_metrics
from megatron_adalrs.utils.atomic_files import AtomicAppend
from tests.metrics.test_metrics import decision, scalars, train


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """As on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_piece_is_in_the_file_whole_or_not_at_all(tmp_path: Path) -> None:
    file = AtomicAppend(tmp_path / "file")
    file.write(b"12345678")
    with files_no_larger_than(10), pytest.raises(OSError, match="File too large"):
        file.write(b"abcdefgh")
    assert (tmp_path / "file").read_bytes() == b"12345678"
    file.write(b"90")
    file.close()
    assert (tmp_path / "file").read_bytes() == b"1234567890"


def test_a_full_disk_loses_only_records_of_that_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = open_metrics(tmp_path, tmp_path / "tb", 10, 1, 0, is_first_rank=True)
    metrics.write("train", train(1))
    full = max(
        file.stat().st_size
        for file in (tmp_path / "tb", tmp_path)
        for file in file.glob("*")
        if file.is_file()
    )
    with files_no_larger_than(full + 5):
        for step in (2, 3):
            metrics.write("train", train(step))
    metrics.write("train", train(4))
    metrics.write("decision", decision("window", 4))
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 4]
    assert [step for step, _ in scalars(tmp_path / "tb", "train/loss")] in ([1, 4], [1, 2, 4])
    told = capsys.readouterr()
    file = tmp_path / "metrics.jsonl"
    assert told.err.count(f"cannot write {file}: File too large; training continues without it") == 1
    assert f"warning: {file} can be written again; it lacks 2 records" in told.err
    assert all(f"step  {step}/10" in told.out for step in (1, 2, 3, 4))


class Failing:
    name = "a sink"

    def write(self, kind: str, record: Any) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise OSError(5, "Input/output error")


def test_permanent_failure_is_reported_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics([Failing(), JsonLines(tmp_path / "lines", frozenset({"train"}))])
    for step in (1, 2, 3):
        metrics.write("train", train(step))
    metrics.close()
    assert (tmp_path / "lines").read_text().count("\n") == 3
    assert capsys.readouterr().err.splitlines() == [
        "warning: cannot write a sink: No space left on device; training continues without it",
        "warning: a sink lacks 4 records of this run",
    ]


def test_a_closed_console_does_not_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`pretrain_gpt.py ... | head` is not to end a run."""
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        metrics = Metrics([ConsoleSink(10, 1, 0)])
        for step in (1, 2, 3):
            metrics.write("train", train(step))
        metrics.close()
    assert capfd.readouterr().err.splitlines() == [
        "warning: cannot write the console: the reader closed the pipe; training continues without it",
        "warning: the console lacks 3 records of this run",
    ]
