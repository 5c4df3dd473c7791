"""`preprocess` as a real process that is killed, terminated or runs out of disk space, and then continues."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_adalrs.preprocessing.preprocess import Recipe, preprocess
from megatron_adalrs.preprocessing.tokenizer_training import train_sentencepiece

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS, EMPTY = 8000, 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, x.jsonl, a tokenizer that takes its time, and what an uninterrupted run makes
    of both."""
    folder = tmp_path_factory.mktemp("whole")
    with (folder / "x.jsonl").open("w") as stream:
        for number in range(DOCUMENTS):
            stream.write(json.dumps({"text": f"{number} " * (number % 400)}) + "\n")
    train_sentencepiece([folder / "x.jsonl"], folder / "x.model", vocab_size=300, sample_bytes=100_000)
    preprocess(folder / "x.jsonl", folder / "whole", Recipe("SentencePieceTokenizer", folder / "x.model"))
    return folder


def begin(
    folder: Path, prefix: Path, *flags: str, limit: Callable[[], None] = lambda: None
) -> subprocess.Popen[str]:
    def before() -> None:
        # What a shell runs in the background is deaf to Ctrl-C, and so is all that it starts: this suite too.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        limit()

    model = folder / "x.model"
    command = [sys.executable, ROOT / "tools" / "preprocess_data.py", "--input", folder / "x.jsonl"]
    command += ["--output-prefix", prefix, "--commit-seconds", "0", *flags]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=before
    )


def wait_for_documents(process: subprocess.Popen[str], prefix: Path, least: int) -> int:
    """The documents that are committed, once there are so many or the process has ended."""
    state = Path(f"{prefix}.partial") / "state.json"
    done = 0
    while done < least and process.poll() is None:
        with suppress(FileNotFoundError):
            done = json.loads(state.read_text())["documents"]
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.002)
    return done


def same(prefix: Path, folder: Path) -> bool:
    return all(
        Path(f"{prefix}.{suffix}").read_bytes() == (folder / f"whole.{suffix}").read_bytes()
        for suffix in ("bin", "idx", "json")
    )


def test_repeated_kills_end_with_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    points = sorted(random.Random(6).sample(range(1, DOCUMENTS * 4 // 5), 4))
    lives = []
    for life, point in enumerate(points):
        process = begin(whole, tmp_path / "out", "--workers", str(1 + life % 2))
        lives.append(wait_for_documents(process, tmp_path / "out", point))
        process.kill()
        # The pipes end when the last process that holds them does: a worker does not outlive its parent.
        _, told = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert told.startswith("continuing from ") if life else told == ""
    assert lives == sorted(lives) and not (tmp_path / "out.idx").exists()
    process = begin(whole, tmp_path / "out", "--workers", "1")
    output, told = process.communicate()
    assert process.returncode == 0
    assert told.startswith(f"continuing from {tmp_path}/out.partial: ")
    assert int(told.split(": ")[1].split()[0]) >= lives[-1]
    assert same(tmp_path / "out", whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "out.idx", "out.json"]
    assert f"out: {DOCUMENTS - EMPTY} documents ({EMPTY} empty ones skipped), " in output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_signal_commits_and_tells_how_to_go_on(
    whole: Path, tmp_path: Path, number: signal.Signals, code: int, workers: str
) -> None:
    process = begin(whole, tmp_path / "out", "--workers", workers)
    assert wait_for_documents(process, tmp_path / "out", 500) >= 500
    process.send_signal(number)
    output, told = process.communicate(timeout=60)
    assert (process.returncode, output) == (code, "")
    assert told == "interrupted: run the same command again to continue\n"
    process = begin(whole, tmp_path / "out")
    _, told = process.communicate()
    assert process.returncode == 0 and told.startswith("continuing from ")
    assert same(tmp_path / "out", whole)


def test_a_full_disk_is_reported_and_resumed_later(whole: Path, tmp_path: Path) -> None:
    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    process = begin(whole, tmp_path / "out", limit=little_room)
    _, told = process.communicate()
    assert process.returncode == 2
    assert (
        told == f"error: {tmp_path}/out.partial cannot be written: File too large; once it can, run the same "
        "command again\n"
    )
    process = begin(whole, tmp_path / "out")
    _, told = process.communicate()
    assert process.returncode == 0 and told.startswith("continuing from ")
    assert same(tmp_path / "out", whole)


def test_a_changed_input_is_one_line_and_exit_code_2(whole: Path, tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.model"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    process = begin(tmp_path, tmp_path / "out")
    wait_for_documents(process, tmp_path / "out", 500)
    process.kill()
    process.communicate()
    (tmp_path / "x.jsonl").write_text('{"text": "more"}\n' + (whole / "x.jsonl").read_text())
    process = begin(tmp_path, tmp_path / "out")
    _, told = process.communicate()
    assert process.returncode == 2
    assert told.startswith(
        f"error: {tmp_path}/out.partial contains unfinished work of another job: input file x.jsonl had "
    )
    assert told.endswith("; --restart throws the unfinished work away\n") and told.count("\n") == 1
    process = begin(tmp_path, tmp_path / "out", "--restart")
    output, told = process.communicate()
    assert (process.returncode, told) == (0, "")
    assert f"out: {DOCUMENTS - EMPTY + 1} documents" in output
