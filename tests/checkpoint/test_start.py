"""How a process starts: which checkpoint the flags and the contents of the run directory select."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.checkpoint import find_checkpoint
from megatron_adalrs.checkpoint.latest import abandon_newer, read_latest, write_latest
from megatron_adalrs.checkpoint.manifest import sha256, write_manifest
from megatron_adalrs.checkpoint.retention import CheckpointFolder, checkpoints_in, remove_old_checkpoints
from megatron_adalrs.checkpoint.start import Start, begin, plan_start
from megatron_adalrs.config import RunConfig
from megatron_adalrs.run_directory import RunDirectory, RunFolders


@contextmanager
def planned(**fields: Any) -> Iterator[tuple[Start, RunDirectory]]:
    run = RunConfig(**fields)
    directory = RunDirectory(RunFolders.of(run))
    try:
        yield plan_start(run, directory), directory
    finally:
        directory.release()


def job(*saves: int, **fields: Any) -> Start:
    """Start a process that saves at these steps and ends."""
    with planned(**fields) as (start, directory):
        directory.claim(start.identity, start.checkpoint if start.is_own else None)
        begin(start, directory.folders.save)
        for step in saves:
            save(directory.folders.save, step, start)
    return start


def save(folder: Path, step: int, start: Start) -> Path:
    checkpoint = folder / f"iter_{step:07d}"
    checkpoint.mkdir(parents=True)
    state = {"run": start.identity.to_json(), "world_size": 1, "config": {}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    write_manifest(checkpoint, {"state.json": sha256(checkpoint / "state.json")}, {"step": step})
    write_latest(folder, checkpoint.name)
    return checkpoint


def refused(**fields: Any) -> str:
    with pytest.raises(ValueError) as error, planned(**fields):
        pass
    return str(error.value)


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("iter_")) for path in checkpoints_in(folder)]


def resumed(start: Start) -> str:
    return start.checkpoint.name if start.checkpoint else "first step"


def test_run_directory_of_a_run_is_refused(tmp_path: Path) -> None:
    job(10, run_dir=tmp_path / "a")
    job(10, run_dir=tmp_path / "b")
    assert "already holds a run" in refused(run_dir=tmp_path / "a")
    assert "already holds a run" in refused(run_dir=tmp_path / "a", load=tmp_path / "b")


def test_loading_continues_a_run_where_it_is(tmp_path: Path) -> None:
    first = job(10, 20, run_dir=tmp_path / "a")
    checkpoints = tmp_path / "a/checkpoints"
    for load in (tmp_path / "a", checkpoints, checkpoints / "latest", checkpoints / "iter_0000020"):
        with planned(load=load) as (start, directory):
            assert directory.folders.run_dir.resolve() == tmp_path / "a"
            assert (start.identity.id, start.is_own) == (first.identity.id, True)
            assert resumed(start) == "iter_0000020"


def test_another_run_directory_begins_a_new_run(tmp_path: Path) -> None:
    first = job(10, run_dir=tmp_path / "a")
    fork = job(20, run_dir=tmp_path / "b", load=tmp_path / "a")
    assert fork.identity.id != first.identity.id and not fork.is_own
    assert fork.identity.parent == str(tmp_path / "a/checkpoints/iter_0000010")
    assert steps(tmp_path / "a/checkpoints") == [10] and steps(tmp_path / "b/checkpoints") == [20]


def test_own_checkpoints_come_before_the_loaded_run(tmp_path: Path) -> None:
    job(10, run_dir=tmp_path / "a")
    flags = {"run_dir": tmp_path / "b", "load": tmp_path / "a", "auto_resume": True}
    assert resumed(job(**flags)) == "iter_0000010"  # killed before its first checkpoint
    assert resumed(job(20, **flags)) == "iter_0000010"
    assert resumed(job(30, **flags)) == "iter_0000020"
    assert resumed(job(**flags)) == "iter_0000030"


def test_requeued_rollback_goes_back_once(tmp_path: Path) -> None:
    run = tmp_path / "a"
    job(10, 20, 30, run_dir=run)
    flags = {"load": run / "checkpoints/iter_0000010", "auto_resume": True}
    assert resumed(job(15, **flags)) == "iter_0000010"
    again = job(25, **flags)
    assert resumed(again) == "iter_0000015" and again.note and "has been applied before" in again.note
    assert steps(run / "checkpoints") == [10, 15, 25]
    assert resumed(job(load=run / "checkpoints/iter_0000010")) == "iter_0000010"


def test_auto_resume_begins_a_killed_run_again(tmp_path: Path) -> None:
    first = job(run_dir=tmp_path / "a")
    again = job(run_dir=tmp_path / "a", auto_resume=True)
    assert resumed(again) == "first step" and again.identity == first.identity


def test_auto_resume_finds_checkpoints_saved_elsewhere(tmp_path: Path) -> None:
    job(10, run_dir=tmp_path / "a", save=tmp_path / "old")
    moved = job(20, run_dir=tmp_path / "a", save=tmp_path / "new", auto_resume=True)
    assert resumed(moved) == "iter_0000010"
    assert resumed(job(run_dir=tmp_path / "a", save=tmp_path / "new", auto_resume=True)) == "iter_0000020"


def test_run_without_its_identity_is_recognized(tmp_path: Path) -> None:
    first = job(10, run_dir=tmp_path / "a")
    (tmp_path / "a/run.json").unlink()
    (tmp_path / "a/checkpoints/run.json").unlink()
    start = job(20, run_dir=tmp_path / "a", auto_resume=True)
    assert (start.identity.id, resumed(start)) == (first.identity.id, "iter_0000010")


def test_rollback_sets_newer_checkpoints_aside(tmp_path: Path) -> None:
    job(10, 20, 30, run_dir=tmp_path / "a")
    save_to = tmp_path / "a/checkpoints"
    job(15, load=save_to / "iter_0000010")
    assert steps(save_to) == [10, 15] and steps(save_to / "abandoned_0001") == [20, 30]
    assert find_checkpoint(tmp_path / "a").name == "iter_0000015"
    job(16, load=save_to / "abandoned_0001/iter_0000020")
    assert steps(save_to) == [10, 15, 16, 20] and read_latest(save_to) == "iter_0000016"


def test_rollback_that_was_killed_is_completed(tmp_path: Path) -> None:
    job(10, 20, 30, run_dir=tmp_path / "a")
    save_to = tmp_path / "a/checkpoints"
    write_latest(save_to, "iter_0000010")
    assert find_checkpoint(tmp_path / "a").name == "iter_0000010"
    job(load=tmp_path / "a")
    assert steps(save_to) == [10]


def test_written_checkpoint_is_never_removed(tmp_path: Path) -> None:
    job(10, 20, 30, run_dir=tmp_path / "a")
    folder = CheckpointFolder(tmp_path / "a/checkpoints", keep_last=1)
    remove_old_checkpoints(folder, folder.save / "iter_0000020")
    assert steps(folder.save) == [20, 30]


@pytest.mark.parametrize("content", [b"", b"nonsense", b"iter_x\n", b"\xff\xfe"])
def test_damaged_latest_counts_as_missing(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    job(10, 20, run_dir=tmp_path / "a")
    (tmp_path / "a/checkpoints/latest").write_bytes(content)
    assert find_checkpoint(tmp_path / "a").name == "iter_0000020"
    assert "the checkpoint with the highest step is taken" in caplog.text


def test_latest_may_name_an_incomplete_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job(10, run_dir=tmp_path / "a")
    write_latest(tmp_path / "a/checkpoints", "iter_0000020")
    assert find_checkpoint(tmp_path / "a", strict=True).name == "iter_0000010"
    assert "names iter_0000020, which is not complete" in caplog.text


def test_latest_without_its_checkpoint_is_named(tmp_path: Path) -> None:
    job(20, run_dir=tmp_path / "a")
    write_latest(tmp_path / "a/checkpoints", "iter_0000010")
    with pytest.raises(ValueError, match=r"latest names iter_0000010, which is missing, .*iter_0000020"):
        find_checkpoint(tmp_path / "a")


def test_copy_elsewhere_rolls_back_too(tmp_path: Path) -> None:
    start = job(10, 30, run_dir=tmp_path / "a")
    copy = save(tmp_path / "backup", 20, start).rename(tmp_path / "kept")
    moved = abandon_newer(tmp_path / "a/checkpoints", copy)
    assert [path.name for path in moved] == ["iter_0000030"]
    assert find_checkpoint(tmp_path / "a").name == "iter_0000010"
