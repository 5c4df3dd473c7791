"""What an offline run of Weights & Biases holds, and what happens where there can be none."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from megatron_adalrs.metrics import Metrics, open_metrics
from megatron_adalrs.metrics.wandb import WandbRun, require_wandb
from tests.metrics.test_metrics import decision, train


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def records(run_dir: Path) -> Iterator[Record]:
    """Of all offline files: LevelDB's log format, blocks of 32 KB, after a header of seven bytes."""
    wandb.teardown()  # waits for its process, which may write after a run is finished
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        content, place, parts = file.read_bytes(), 7, b""
        while place + 7 <= len(content):
            if (left := 32768 - place % 32768) < 7:
                place += left
                continue
            length, kind = struct.unpack_from("<HB", content, place + 4)
            parts += content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                record = Record()
                record.ParseFromString(parts)
                parts = b""
                yield record


def history(run_dir: Path) -> list[dict[str, float]]:
    """What was logged, without what Weights & Biases adds itself."""
    found = []
    for record in records(run_dir):
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            found.append({key: value for key, value in items.items() if not key.startswith("_")})
    return found


def shown(folder: Path) -> Metrics:
    run = WandbRun("project", "name", folder, {"lr": 1e-3})
    return open_metrics(folder, folder / "tb", 10, 1, 0, True, wandb=run)


def test_shows_the_same_as_tensorboard_over_kept_steps(tmp_path: Path) -> None:
    metrics = shown(tmp_path)
    metrics.write("train", train(1))
    metrics.write("train", train(2, "trial", loss=9.0))
    metrics.write("decision", decision("failed", 2, restore="initial"))
    metrics.write("train", train(2, loss=1.5))
    metrics.write("eval", {"split": "valid", "step": 2, "total_steps": 3, "loss": 1.7, "perplexity": 5.5})
    metrics.close()
    logged = history(tmp_path)
    assert [(one["step"], one["train/loss"]) for one in logged if "train/loss" in one] == [(1, 2.0), (2, 1.5)]
    assert {"trial/loss": 9.0, "step": 2} in logged
    assert any(
        {"adalrs/scale": 3.0, "adalrs/velocity": 0.1, "step": 2}.items() <= one.items() for one in logged
    )
    assert {"valid/loss": 1.7, "valid/perplexity": 5.5, "step": 2} in logged
    (run,) = (record.run for record in records(tmp_path) if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("project", "name")
    assert "lr" in {item.key for item in run.config.update}

    time.sleep(1.1)  # the folder of a run is named by the second
    resumed = shown(tmp_path)
    resumed.write("train", train(3))
    resumed.close()
    ids = {record.run.run_id for record in records(tmp_path) if record.WhichOneof("record_type") == "run"}
    assert ids == {(tmp_path / "wandb_id").read_text()}


def test_where_it_cannot_begin_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr("wandb.init", refuse)
    metrics = shown(tmp_path)
    for step in (1, 2, 3):
        metrics.write("train", train(step))
    metrics.close()
    told = capsys.readouterr().err
    assert told.count("warning: cannot write Weights & Biases' project project: ") == 1
    assert "training continues without it" in told and "lacks 3 records of this run" in told
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3


def test_without_the_package_a_project_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_wandb(None)
    require_wandb("mine")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("megatron_adalrs.metrics.wandb.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb_project: mine: needs the package wandb: pip install"):
        require_wandb("mine")
