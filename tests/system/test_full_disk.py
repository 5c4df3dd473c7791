"""Checkpoints on a full disk, which is a small tmpfs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.checkpoint import find_checkpoint, find_damage
from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.metrics.run_log import read_run
from megatron_adalrs.training.build import build_trainer
from tests.checkpoint.test_checkpoint import losses, trained, values
from tests.data.corpora import counting_corpus
from tests.helpers.ranks import Ranks

ROOM = 4 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount an empty tmpfs of `ROOM` bytes."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("a tmpfs can be mounted by root only")
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return counting_corpus(tmp_path / "counting")


def fill(disk: Path, left: int) -> None:
    """Fill the disk until `left` bytes are free, up to the size of a page."""
    with (disk / "filling").open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - left))


def trained_on_a_full_disk(config: dict[str, Any], disk: str, left: int) -> int:
    """Train after the disk has been filled, since a run is refused if it is full at the start."""
    trainer = build_trainer(config_from_values(config))
    fill(Path(disk), left)
    return trainer.train()


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["nothing left", "half of a checkpoint left"])
def test_a_full_disk_damages_no_checkpoint(
    one_rank: Ranks, data: Path, disk: Path, tmp_path: Path, share: float
) -> None:
    run = tmp_path / "run"
    config = values(data, run, save=str(disk / "checkpoints"), auto_resume=True, save_interval=5)
    assert one_rank.run(trained, config | {"exit_interval": 10}) == [143]
    previous = find_checkpoint(disk / "checkpoints")
    size = sum(path.stat().st_size for path in previous.rglob("*") if path.is_file())
    assert size > 8 * 4096
    assert one_rank.run(trained_on_a_full_disk, config, str(disk), int(share * size)) == [
        1
    ]  # trained to its end, but the last checkpoint is missing
    assert find_checkpoint(disk / "checkpoints") == previous and find_damage(previous, hashes=True) is None
    failed = [event for event in read_run(run).events if event.event == "save_failed"]
    assert [event.step for event in failed] == [15, 20, 25]
    assert all(
        "No space left" in str(event.message) or "bytes free" in str(event.message) for event in failed
    )
    assert not list((disk / "checkpoints").glob(".*.incomplete/*"))
    whole = losses(run)
    (disk / "filling").unlink()
    assert one_rank.run(trained, config) == [0]
    assert losses(run) == whole and find_checkpoint(disk / "checkpoints").name == "iter_0000025"
    assert "resumed" not in str(failed) and read_run(run).events[-1].event == "end"


def test_a_save_that_fills_the_disk_is_not_published(
    one_rank: Ranks, data: Path, disk: Path, tmp_path: Path
) -> None:
    """Only half of the files fit, and without a checkpoint the space that they need is not known."""
    run = tmp_path / "run"
    config = values(data, run, save=str(disk / "checkpoints"), auto_resume=True, save_interval=5)
    assert one_rank.run(trained, config | {"exit_interval": 10}) == [143]
    previous = find_checkpoint(disk / "checkpoints")
    size = sum(path.stat().st_size for path in previous.rglob("*") if path.is_file())
    shutil.copytree(previous, tmp_path / "kept")
    shutil.rmtree(disk / "checkpoints")  # without it a save starts however much space is free
    again = config | {"load": str(tmp_path / "kept"), "auto_resume": False}
    assert one_rank.run(trained_on_a_full_disk, again, str(disk), size // 2) == [1]
    failed = [event for event in read_run(run).events if event.event == "save_failed"]
    assert [event.step for event in failed] == [15, 20, 25]
    assert all(
        "cannot write to" in str(event.message) or "No space left" in str(event.message) for event in failed
    )
    assert len(losses(run)) == 25
    assert find_damage(tmp_path / "kept", hashes=True) is None
