"""RunDirectory: what a new run refuses, what it writes, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_adalrs.config import RunConfig
from megatron_adalrs.run_directory import RunDirectory, RunFolders, RunIdentity, find_run_directory


@contextmanager
def opened(**fields: Path) -> Iterator[RunDirectory]:
    directory = RunDirectory(RunFolders.of(RunConfig(**fields)))
    try:
        yield directory
    finally:
        directory.release()


def started(**fields: Path) -> RunIdentity:
    """Start a run in its folders, and end it."""
    identity = RunIdentity.new()
    with opened(**fields) as directory:
        directory.require_new()
        directory.claim(identity)
        directory.write_config({"lr": 0.1})
    return identity


def test_folders_default_to_the_run_directory() -> None:
    run = Path("a/run")
    assert RunFolders.of(RunConfig(run_dir=run)) == (run, run / "checkpoints", run / "tensorboard")
    assert RunFolders.of(RunConfig(run_dir=run, save=Path("s"))).save == Path("s")
    assert RunFolders.of(RunConfig()).run_dir.parent == Path("runs")


@pytest.mark.parametrize("field", ["run_dir", "save", "tensorboard_dir"])
def test_folder_of_another_run_is_refused(tmp_path: Path, field: str) -> None:
    theirs = RunFolders.inside(tmp_path / "theirs")
    started(run_dir=theirs.run_dir)
    for folder in theirs:
        with opened(**{"run_dir": tmp_path / "mine", field: folder}) as directory:
            with pytest.raises(ValueError, match=f"^{field}: {folder} already holds .*, started at "):
                directory.require_new()
            with pytest.raises(ValueError, match=f"^{field}: {folder} already holds "):
                directory.claim(RunIdentity.new())
            directory.withdraw()
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "iter_0000010", "events.out.tfevents.1"])
def test_files_without_identity_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "save").mkdir()
    (tmp_path / "save" / name).touch()
    with (
        opened(run_dir=tmp_path / "run", save=tmp_path / "save") as directory,
        pytest.raises(ValueError, match=rf"^save: .* already holds {name} of another run; choose another"),
    ):
        directory.require_new()


def test_refused_run_leaves_nothing(tmp_path: Path) -> None:
    with opened(run_dir=tmp_path / "a/b/run", save=tmp_path / "c/save") as directory:
        directory.claim(RunIdentity.new())
        directory.write_config({})
        directory.withdraw()
    assert not list(tmp_path.iterdir())


def test_withdrawing_keeps_the_files_of_a_run(tmp_path: Path) -> None:
    identity = started(run_dir=tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json")}
    with opened(run_dir=tmp_path / "run") as directory:
        directory.claim(identity)
        directory.withdraw()
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json")}
    assert (tmp_path / "run/config.yaml").read_text() == "lr: 0.1\n"


def test_all_folders_name_the_run_directory(tmp_path: Path) -> None:
    run, save = tmp_path / "run", tmp_path / "elsewhere/save"
    identity = started(run_dir=run, save=save)
    assert json.loads((run / "run.json").read_text())["save"] == "../elsewhere/save"
    for path in (run, save, save / "iter_0000010", save / "latest", run / "tensorboard"):
        found = find_run_directory(path)
        assert found is not None and found.resolve() == run
    with opened(run_dir=run) as directory:
        assert directory.identity == identity


def test_moved_run_is_still_found(tmp_path: Path) -> None:
    started(run_dir=tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    found = find_run_directory(tmp_path / "moved/checkpoints/iter_0000010")
    assert found == tmp_path / "moved"
    assert find_run_directory(tmp_path / "run") is None


def test_folder_of_two_fields_is_claimed_once(tmp_path: Path) -> None:
    identity = started(run_dir=tmp_path / "run", save=tmp_path / "run")
    with opened(run_dir=tmp_path / "run", save=tmp_path / "run") as directory:
        directory.claim(identity)


def test_lost_identity_is_restored(tmp_path: Path) -> None:
    identity = started(run_dir=tmp_path / "run")
    save = tmp_path / "run/checkpoints"
    (save / "iter_0000010").mkdir()
    (tmp_path / "run/run.json").unlink()
    (save / "run.json").unlink()
    with opened(run_dir=tmp_path / "run") as directory:
        directory.claim(identity, save / "iter_0000010")
        assert directory.identity == identity


@pytest.mark.parametrize("content", ["", "[]", '{"id": 3}', '{"id": "a"}', '{"id": "a", "started": null}'])
def test_damaged_identity_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json cannot be read"), opened(run_dir=tmp_path) as directory:
        assert directory.identity
