"""Publishing, verifying, retaining and resuming checkpoints."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.checkpoint import CheckpointFolder, find_checkpoint, find_damage, save_checkpoint
from megatron_adalrs.checkpoint.manifest import sha256, step_of, write_manifest
from megatron_adalrs.checkpoint.retention import checkpoints_in, remove_old_checkpoints
from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.metrics.run_log import read_run
from megatron_adalrs.training.build import build_trainer
from tests.helpers import runs
from tests.helpers.ranks import Ranks
from tests.helpers.settings import ONE_LAYER, counting_data


def fake(save: Path, step: int, of: str = "a run") -> Path:
    """Write a published checkpoint of three small files."""
    checkpoint = save / f"iter_{step:07d}"
    (checkpoint / "engine").mkdir(parents=True)
    for name in ("state.json", "random_00000.json", "engine/weights.pt"):
        (checkpoint / name).write_text(f'{{"{name}": {step}, "of": "{of}"}}')
    write_manifest(
        checkpoint, {name: sha256(checkpoint / name) for name in files_of(checkpoint)}, {"step": step}
    )
    return checkpoint


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def truncate(checkpoint: Path) -> None:
    file = checkpoint / "engine/weights.pt"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(checkpoint: Path) -> None:
    file = checkpoint / "engine/weights.pt"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)


def copy_manifest(source: Path, target: Path) -> None:
    shutil.copy(source / "manifest.json", target)


def rewrite_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        change(manifest)
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"engine/weights.pt has 38 bytes, manifest.json says 39"),
        (lambda c: (c / "random_00000.json").unlink(), "random_00000.json is missing"),
        (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing or unreadable"),
        (lambda c: (c / "manifest.json").write_text("{"), "manifest.json is missing or unreadable"),
        (lambda c: (c / "manifest.json").write_text("[]"), "manifest.json is missing or unreadable"),
        (
            rewrite_manifest(lambda m: m.update(format=99)),
            "manifest.json has format 99, required: format 4",
        ),
        (rewrite_manifest(lambda m: m["files"].update(x={"size": 1, "sha256": "0" * 64})), "x is missing"),
        (
            lambda c: (c / "state.json").write_text('{"state.json": 2, "of": "a run"}'),
            "state.json has SHA-256",
        ),
        (lambda c: copy_manifest(fake(c.parent / "other", 1, of="b run"), c), "has SHA-256"),
        (lambda c: copy_manifest(fake(c.parent, 2), c), "manifest.json is of step 2"),
    ],
)
def test_damage_is_found_without_hashing_tensors(tmp_path: Path, damage: Any, message: str) -> None:
    checkpoint = fake(tmp_path, 1)
    assert find_damage(checkpoint) is None
    damage(checkpoint)
    assert message in str(find_damage(checkpoint))


def test_flipped_bit_is_found_by_hashes(tmp_path: Path) -> None:
    checkpoint = fake(tmp_path, 1)
    flip_a_bit(checkpoint)
    assert find_damage(checkpoint) is None
    assert "engine/weights.pt has SHA-256" in str(find_damage(checkpoint, hashes=True))


def test_damaged_newest_one_is_skipped_or_refused(tmp_path: Path) -> None:
    older, newer = fake(tmp_path, 999), fake(tmp_path, 1000)
    assert find_checkpoint(tmp_path) == newer
    flip_a_bit(newer)
    assert find_checkpoint(tmp_path) == newer
    assert find_checkpoint(tmp_path, verify=True) == older
    with pytest.raises(
        ValueError, match=r"newest checkpoint is damaged: .*iter_0001000: engine/weights.pt has SHA-256"
    ):
        find_checkpoint(tmp_path, strict=True, verify=True)
    truncate(older)
    truncate(newer)
    with pytest.raises(
        ValueError, match=r"no complete checkpoint in .*; damaged: .*iter_0001000.*iter_0000999"
    ):
        find_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"iter_0000999 is damaged: engine/weights.pt has 40 bytes"):
        find_checkpoint(older)


@pytest.mark.parametrize("strict", [False, True])
def test_other_format_is_refused(tmp_path: Path, strict: bool) -> None:
    fake(tmp_path, 1)
    newest = fake(tmp_path, 2)
    rewrite_manifest(lambda manifest: manifest.update(format=2))(newest)
    for given in (tmp_path, newest):
        with pytest.raises(ValueError) as error:
            find_checkpoint(given, strict=strict)
        assert str(error.value) == (
            f"--load: {newest} has checkpoint format 2, but this version of megatron_adalrs requires format 4"
        )


def test_retention_keeps_newest_and_milestones(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        fake(tmp_path, step)
    truncate(tmp_path / "iter_0000050")
    written = tmp_path / "iter_0000060"
    remove_old_checkpoints(CheckpointFolder(tmp_path, keep_last=2, retain_interval=20), written)
    left = [int(path.name.removeprefix("iter_")) for path in sorted(tmp_path.iterdir())]
    # 60 and 40 are the newest that are sound, 50 is damaged and not touched, 20 is a milestone.
    assert left == [20, 40, 50, 60]


def saved_twice(folder: str) -> list[list[str]]:
    config, mesh, engine = runs.start({})
    found = []
    for step in (1, 2, 2):
        engine.train_batch(runs.micro_batches(config, mesh, step))
        save_checkpoint(
            engine, mesh, CheckpointFolder(Path(folder), keep_last=1), step, {"config": config.to_flat()}
        )
        found.append(sorted(path.name for path in Path(folder).iterdir()))
    return found


def test_published_checkpoint_is_complete(two_ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / ".iter_0000001.incomplete").mkdir()  # of a process that was killed
    for found in two_ranks.run(saved_twice, str(tmp_path)):
        assert found == [["iter_0000001", "latest"], ["iter_0000002", "latest"], ["iter_0000002", "latest"]]
    checkpoint = tmp_path / "iter_0000002"
    assert find_damage(checkpoint, hashes=True) is None
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert sorted(manifest["files"]) == [name for name in files_of(checkpoint) if name != "manifest.json"]
    assert manifest["step"] == 2 and manifest["mesh"]["data"] == 2
    assert (tmp_path / "latest").read_text() == "iter_0000002\n"


def values(data: Path, run: Path, **changes: Any) -> dict[str, Any]:
    return {
        "preset": "gpt2-tiny",
        **ONE_LAYER,
        **counting_data(data),
        "micro_batch_size": 4,
        "train_iters": 25,
        "lr": 1e-3,
        "eval_iters": 1,
        "hidden_dropout": 0.1,
        "run_dir": str(run),
    } | changes


def trained(config: dict[str, Any], largest_file: int | None = None) -> int:
    """Train and return the exit code; `largest_file` limits the size of files, like a full disk."""
    trainer = build_trainer(config_from_values(config))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, before[1]))
    try:
        return trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def losses(run: Path) -> list[tuple[int, float]]:
    train = read_run(run).train
    return list(zip(train.step[train.kept].tolist(), train.loss[train.kept].tolist(), strict=True))


def test_requeued_job_resumes_exactly(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    assert one_rank.run(trained, values(data, tmp_path / "whole")) == [0]
    job = values(data, tmp_path / "job", auto_resume=True, exit_interval=10)
    assert [one_rank.run(trained, job)[0] for _ in range(3)] == [143, 143, 0]
    assert losses(tmp_path / "job") == losses(tmp_path / "whole")
    assert [event.event for event in read_run(tmp_path / "job").events if event.event == "resume"] == [
        "resume"
    ] * 2


def test_job_ends_after_its_duration(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    job = values(data, tmp_path / "job", exit_duration_in_mins=1e-9)
    assert one_rank.run(trained, job) == [143]
    assert len(losses(tmp_path / "job")) == 1
    assert find_checkpoint(tmp_path / "job").name == "iter_0000001"


def test_failed_save_keeps_run_and_last_checkpoint(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert one_rank.run(trained, values(data, run, exit_interval=10)) == [143]
    size = max(path.stat().st_size for path in (run / "checkpoints").rglob("*.pt"))
    assert size > 50_000  # larger than everything else that a run writes
    again = values(data, run, load=str(run), save_interval=5)
    assert one_rank.run(trained, again, size // 2) == [1]
    log = read_run(run)
    failed = [event for event in log.events if event.event == "save_failed"]
    assert [event.step for event in failed] == [15, 20, 25]
    assert "cannot write to" in failed[0].message and "no checkpoint at step 15" in failed[0].message
    assert len(losses(run)) == 25
    assert find_checkpoint(run).name == "iter_0000010"


def test_auto_resume_needs_a_run_dir() -> None:
    with pytest.raises(ValueError, match="auto_resume: needs run_dir"):
        config_from_values(
            {k: v for k, v in values(Path("x"), Path("y"), auto_resume=True).items() if k != "run_dir"}
        )


def test_auto_resume_refuses_if_all_are_damaged(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    job = values(data, tmp_path / "job", auto_resume=True, exit_interval=10)
    assert one_rank.run(trained, job) == [143]
    (tmp_path / "job/checkpoints/iter_0000010/state.json").unlink()
    assert "state.json is missing" in one_rank.run(refusal, job)[0]
    shutil.rmtree(tmp_path / "job/checkpoints")
    assert one_rank.run(trained, job | {"exit_interval": None}) == [0]
    assert len(losses(tmp_path / "job")) == 25


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as error:
        build_trainer(config_from_values(config))
    return str(error.value)


def test_async_save_equals_synchronous_save(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    job = values(data, tmp_path / "job", async_save=True, save_interval=5)
    assert one_rank.run(trained, job) == [0]
    plain = values(data, tmp_path / "plain", save_interval=5)
    assert one_rank.run(trained, plain) == [0]
    steps = [5, 10, 15, 20, 25]
    assert [step_of(path) for path in checkpoints_in(tmp_path / "job/checkpoints")] == steps
    events = [event for event in read_run(tmp_path / "job").events if event.event in ("saving", "saved")]
    assert [event.event for event in events] == ["saving", "saved"] * 4
    assert re.search(r"checkpoint of step 5: [\d.]+ kB per rank copied in \d+\.\d\d s", events[0].message)
    resumed = values(data, tmp_path / "job", load=str(tmp_path / "job/checkpoints/iter_0000010"))
    assert one_rank.run(trained, resumed) == [0]
    assert losses(tmp_path / "job") == losses(tmp_path / "plain")


def test_failed_async_save_stops_the_run(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert one_rank.run(trained, values(data, run, exit_interval=10)) == [143]
    size = max(path.stat().st_size for path in (run / "checkpoints").rglob("*.pt"))
    again = values(data, run, load=str(run), save_interval=5, async_save=True)
    assert one_rank.run(trained, again, size // 2) == [1]
    last = read_run(run).events[-1]
    assert last.event == "stopped"
    assert re.search(
        r"stopped at step \d+: the checkpoint of step 15 could not be written: cannot write", last.message
    )
    assert find_checkpoint(run).name == "iter_0000010"
