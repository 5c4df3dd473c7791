"""Run directories end to end: configurations passed back, rollbacks, refusals and resumed commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_adalrs.cli.arguments import parse_arguments
from megatron_adalrs.metrics.run_log import read_run
from megatron_adalrs.training.build import build_trainer
from tests.helpers.ranks import Ranks
from tests.helpers.settings import ONE_LAYER


def flags(data: Path, *others: str) -> list[str]:
    fixed = {"preset": "gpt2-tiny", **ONE_LAYER, "data_path": data, "vocab_size": 50, "split": "8,1,1"}
    fixed |= {"micro_batch_size": 4, "train_iters": 12, "lr": 1e-3, "eval_iters": 1, "save_interval": 4}
    given = [word for name, value in fixed.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*given, *others]


def pretrain(arguments: list[str], folder: str | None = None) -> Any:
    """Run a command line in this rank, in another working directory if one is given."""
    before = os.getcwd()
    os.chdir(folder or before)
    try:
        return build_trainer(parse_arguments(arguments)).train()
    except (ValueError, SystemExit) as error:
        return str(error)
    finally:
        os.chdir(before)


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("iter_")) for path in sorted(folder.glob("iter_*"))]


def losses(run: Path) -> dict[int, float]:
    train = read_run(run).train
    kept = train.kept
    return dict(zip(train.step[kept].tolist(), train.loss[kept].tolist(), strict=True))


def test_config_passed_back_starts_another_run(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    assert one_rank.run(pretrain, flags(data, "--run-dir", str(a))) == [0]
    before = {path: path.stat().st_mtime_ns for path in a.rglob("*")}
    again = ["--config", str(a / "config.yaml"), "--run-dir", str(b), "--lr", "5e-3", "--keep-last", "1"]
    assert one_rank.run(pretrain, again) == [0]
    assert {path: path.stat().st_mtime_ns for path in a.rglob("*")} == before
    assert steps(a / "checkpoints") == [4, 8, 12] and steps(b / "checkpoints") == [12]
    stored = yaml.safe_load((b / "config.yaml").read_text())
    assert stored["lr"] == 5e-3 and not stored.keys() & {"save", "tensorboard_dir", "load", "auto_resume"}
    (refusal,) = one_rank.run(pretrain, flags(data, "--run-dir", str(b)))
    assert "already holds a run" in refusal


def test_rollback_goes_on_from_its_own_branch(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert one_rank.run(pretrain, flags(data, "--run-dir", str(run))) == [0]
    whole = losses(run)
    back = ["--load", str(run / "checkpoints/iter_0000004"), "--exit-interval", "6", "--keep-last", "1"]
    assert one_rank.run(pretrain, back) == [143]
    assert steps(run / "checkpoints") == [6] and steps(run / "checkpoints/abandoned_0001") == [8, 12]
    assert (run / "checkpoints/latest").read_text() == "iter_0000006\n"
    assert one_rank.run(pretrain, ["--load", str(run)]) == [0]
    assert losses(run) == whole
    events = [event.event for event in read_run(run).events]
    assert events.count("rolled_back") == 1 and events.count("resume") == 2


def test_relative_paths_keep_their_meaning(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    start, elsewhere = tmp_path / "start", tmp_path / "elsewhere"
    start.mkdir()
    elsewhere.mkdir()
    relative = os.path.relpath(data, start)
    first = flags(Path(relative), "--run-dir", "run", "--exit-interval", "4")
    assert one_rank.run(pretrain, first, str(start)) == [143]
    assert one_rank.run(pretrain, ["--load", "../start/run"], str(elsewhere)) == [0]
    assert steps(start / "run/checkpoints") == [4, 8, 12] and not list(elsewhere.iterdir())


def test_interrupted_run_prints_the_whole_command(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    assert one_rank.run(pretrain, flags(data, "--run-dir", str(run), "--exit-interval", "4")) == [143]
    (message,) = [event.message for event in read_run(run).events if event.event == "interrupted"]
    assert message is not None and message.endswith(f"megatron-adalrs pretrain --load '{run}'")


@pytest.mark.parametrize("field", ["save", "tensorboard-dir", "run-dir"])
def test_unwritable_folder_is_refused_at_once(
    one_rank: Ranks, data: Path, tmp_path: Path, field: str
) -> None:
    (tmp_path / "file").touch()
    others = ["--run-dir", str(tmp_path / "run"), f"--{field}", str(tmp_path / "file")]
    (refusal,) = one_rank.run(pretrain, flags(data, *others))
    assert refusal == f"{field.replace('-', '_')}: {tmp_path / 'file'} is not a folder"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_failed_resume_keeps_the_configuration(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert one_rank.run(pretrain, flags(data, "--run-dir", str(run), "--exit-interval", "4")) == [143]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (refusal,) = one_rank.run(pretrain, ["--load", str(run), "--bf16"])
    assert "bf16" in refusal
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_loading_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--load: there is no run and no checkpoint in .*/nowhere$"):
        parse_arguments(["--load", str(tmp_path / "nowhere")])


def test_finetuning_takes_the_length_of_the_run(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    assert one_rank.run(pretrain, flags(data, "--run-dir", str(tmp_path / "run"))) == [0]
    needed = ["--data-path", str(data), "--micro-batch-size", "4", "--lr", "1e-3", "--train-iters", "2"]
    for source in ("run", "run/checkpoints", "run/checkpoints/iter_0000008", "run/checkpoints/latest"):
        config = parse_arguments([*needed, "--finetune-from", str(tmp_path / source)])
        assert (config.model.seq_length, config.model.hidden_size) == (16, 16)
