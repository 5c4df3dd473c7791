"""Ranks started by several launchers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_adalrs.commands.pretrain import main
from megatron_adalrs.distributed.launcher import adopt_launch_environment
from tests.data.corpora import counting_corpus

ROOT = Path(__file__).parents[2]
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SLURM, ("3", "8", "1")),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            ("1", "2", "0"),
        ),
        (SLURM | {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "0"}, ("5", "6", "0")),  # torchrun under srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (None, None, None)),  # the script of a batch job
        ({}, (None, None, None)),
    ],
)
def test_rank_and_world_size_of_each_launcher(
    environment: dict[str, str], expected: tuple[str | None, ...]
) -> None:
    environment = dict(environment)
    adopt_launch_environment(environment)
    assert tuple(environment.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK: 1: required 0 to 0, the ranks of WORLD_SIZE 1"),
        ({"RANK": "4", "WORLD_SIZE": "2"}, "RANK: 4: required 0 to 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: '-1': required a whole number of at least 0"),
        ({"RANK": "0"}, r"sets RANK \(0\) but not WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, r"sets WORLD_SIZE \(2\) but not RANK"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE: 0: required at least 1"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE: 'two': required a whole number"),
        ({"RANK": "", "WORLD_SIZE": "1"}, "RANK: ''"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK: 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3"}, "LOCAL_RANK: 3: required 0 to 0"),
        (SLURM | {"SLURM_PROCID": "8"}, "RANK: 8: required 0 to 7"),
    ],
)
def test_ranks_that_cannot_be_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adopt_launch_environment(dict(environment))


def test_a_rank_beyond_the_world_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    started = time.monotonic()
    assert main([]) == 2
    assert time.monotonic() - started < 10
    assert "RANK: 1: required 0 to 0" in capsys.readouterr().err


def test_ranks_started_by_srun_train_together(tmp_path: Path) -> None:
    data = counting_corpus(tmp_path / "counting")
    command = [
        sys.executable,
        "pretrain_gpt.py",
        "--preset",
        "gpt2-tiny",
        "--num-layers",
        "1",
        "--hidden-size",
        "16",
        "--num-attention-heads",
        "2",
        "--seq-length",
        "16",
        "--vocab-size",
        "50",
        "--data-path",
        str(data),
        "--split",
        "8,1,1",
        "--train-iters",
        "3",
        "--lr",
        "1e-3",
        "--eval-iters",
        "1",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    common = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    common |= {
        "SLURM_STEP_NUM_TASKS": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    first, second = (rank.communicate(timeout=300)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], first + second
    assert "2 rank(s)" in first and "done: 3 steps" in first
    assert "done" not in second
