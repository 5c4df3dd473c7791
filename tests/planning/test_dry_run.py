"""`--dry-run` on the command line prints a plan, exits with 0 and writes nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import pretrain_gpt
from megatron_adalrs.cli.arguments import config_from_values

FLAGS = "--preset gpt2-tiny --seq-length 32 --train-iters 100 --lr 1e-3 --data-path nowhere --dry-run"


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, flags: str, rank: str = "0") -> int:
    """Return the exit code of the program in an empty folder, as this rank."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", str(int(rank) + 1))
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *FLAGS.split(), *flags.split()])
    return pretrain_gpt.main()


def test_dry_run_needs_no_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        "--vocab-size 300 --world-size 1024 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    )
    assert run(monkeypatch, tmp_path, flags) == 0
    output = capsys.readouterr().out
    assert "on 1024 rank(s)" in output
    assert "512-1023" in output
    assert "data_path: there is no nowhere.idx yet" in output
    assert list(tmp_path.iterdir()) == []


def test_only_first_rank_prints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, "--vocab-size 300", rank="1") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--vocab-size 300 --world-size 6 --tensor-model-parallel-size 4", "4: 6 = 1 x 4 + 2"),
        (
            "--vocab-size 300 --world-size 4 --global-batch-size 6",
            "global_batch_size: 6 is not a multiple of",
        ),
        ("", "there is no file nowhere.idx"),
        (
            "--vocab-size 99 --tokenizer-type ByteTokenizer",
            "vocab_size: 99 is below the 257 tokens of the tokenizer",
        ),
    ],
)
def test_dry_run_refuses_what_a_run_refuses(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    message: str,
) -> None:
    assert run(monkeypatch, tmp_path, flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_a_world_size_is_for_dry_runs_only() -> None:
    values = {
        "preset": "gpt2-tiny",
        "seq_length": 32,
        "train_iters": 9,
        "lr": 1e-3,
        "data_path": "d",
        "world_size": 8,
    }
    with pytest.raises(ValueError, match="world_size: 8 can be planned with --dry-run only"):
        config_from_values(values)
