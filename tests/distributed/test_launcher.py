"""Ranks started by several launchers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
