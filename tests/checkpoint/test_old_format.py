"""Files of version 0.1 are refused with one sentence and left as they are."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_adalrs.cli.arguments import load_yaml
from tests.checkpoint.test_checkpoint import refusal, values
from tests.data.corpora import counting_corpus
from tests.helpers.programs import called
from tests.helpers.ranks import Ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """Write a run directory like version 0.1: a journal and one checkpoint of step 10."""
    run = tmp_path / "old"
    checkpoint = run / "checkpoints" / "iter_0000010"
    checkpoint.mkdir(parents=True)
    state = {
        "progress": {"step": 10, "consumed_samples": 40, "passed_over": [[4, 8]], "undone_steps": 1},
        "controller": {"mode": "fixed", "step": 10},
        "bad_numbers": {},
        "identity": {"vocab_size": 50},
        "config": {"num_layers": 1, "bad_numbers": {"policy": "skip"}},
        "world_size": 1,
    }
    content = json.dumps(state).encode()
    (checkpoint / "state.json").write_bytes(content)
    manifest = {
        "format": 2,
        "versions": {"megatron_adalrs": "0.1.0", "torch": "2.9.0", "deepspeed": "0.18.0", "python": "3.13.0"},
        "step": 10,
        "files": {"state.json": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}},
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (run / "checkpoints" / "latest").write_text("iter_0000010\n")
    (run / "metrics.jsonl").write_text('{"event": "start", "step": 0}\n')
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sentence(run: Path, flag: str) -> str:
    checkpoint = run / "checkpoints" / "iter_0000010"
    return (
        f"{flag}: {checkpoint} has checkpoint format 2, but this version of megatron_adalrs requires format 4"
    )


@pytest.mark.parametrize(
    ("given", "flag"),
    [("load", "--load"), ("auto_resume", "--load"), ("finetune_from", "--finetune-from")],
)
def test_old_checkpoint_is_refused(
    one_rank: Ranks, old_run: Path, tmp_path: Path, given: str, flag: str
) -> None:
    before = contents(old_run)
    data = counting_corpus(tmp_path / "data")
    source: Any = True if given == "auto_resume" else str(old_run)
    run = tmp_path / "new" if given == "finetune_from" else old_run
    assert one_rank.run(refusal, values(data, run, **{given: source})) == [sentence(old_run, flag)]
    assert contents(old_run) == before


def test_pretrain_exits_with_2(old_run: Path, tmp_path: Path) -> None:
    before = contents(old_run)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values(counting_corpus(tmp_path / "data"), old_run, auto_resume=True)))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_adalrs", "pretrain", "--config", str(config)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert f"error: {sentence(old_run, '--load')}\n" in done.stderr
    assert contents(old_run) == before


def test_convert_refuses_an_old_checkpoint(
    old_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = called("convert", monkeypatch, capsys)("--from", old_run, "--to-hf", tmp_path / "exported")
    assert (done.returncode, done.stderr) == (2, f"error: {sentence(old_run, '--from')}\n")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"bad_numbers": {"policy": "skip"}},
            "bad_numbers: no such field; it has been renamed to loss_guard",
        ),
        (
            {"loss_guard": {"pass_over": 1}},
            "loss_guard.pass_over: no such field; it has been renamed to extra_skipped_batches",
        ),
        (
            {"loss_guard": {"max_in_a_row": 1}},
            "loss_guard.max_in_a_row: no such field; it has been renamed to max_consecutive",
        ),
        (
            {"loss_guard": {"max_passed_over": 0.1}},
            "loss_guard.max_passed_over: no such field; it has been renamed to max_skipped",
        ),
    ],
)
def test_old_key_in_config_is_named(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError) as error:
        load_yaml(file)
    assert str(error.value) == f"{file}: {message}"
