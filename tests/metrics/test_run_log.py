from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_adalrs.metrics.run_log import read_run

Record = dict[str, Any]


def train(step: int, total: int, **fields: Any) -> Record:
    record = {"kind": "train", "step": step, "total_steps": total, "loss": 5.0 - 0.01 * step, "lr": 1e-4}
    record |= {"scale": 1.0, "phase": "watch", "grad_norm": None, "applied": True, "tokens_per_second": 80.0}
    record |= {"flops_per_second": 1e9, "seconds": 0.1, "memory_bytes": None, "consumed_tokens": 8 * step}
    return record | {"discarded_tokens": 0, "time": 100.0 + total} | fields


def run_event(event: str, step: int, total: int, time: float) -> Record:
    return {"kind": "run", "event": event, "step": step, "total_steps": total, "time": time}


def evaluation(step: int, total: int, loss: float = 4.0) -> Record:
    position = {"step": step, "total_steps": total, "time": 100.5 + total}
    return {"kind": "eval", "split": "valid", "loss": loss, "perplexity": math.exp(loss)} | position


def decision(event: str, step: int, total: int, before: float, after: float, **fields: Any) -> Record:
    record = {"kind": "decision", "event": event, "step": step, "total_steps": total, "scale_before": before}
    record |= {"scale_after": after, "velocity": None, "error": None, "reference_velocity": None}
    record |= {"reference_error": None, "threshold": None, "discarded_steps": 0, "reason": "because"}
    record |= {"capture": "trial" if event == "trial_started" else None}
    record |= {"restore": "trial" if event in ("failed", "neutral", "aborted", "interrupted") else None}
    return record | {"snapshot_seconds": None, "time": 100.5 + total} | fields


def write(
    path: Path, metrics: Sequence[Record], decisions: Sequence[Record] = (), config: str = "lr: 1.0e-4\n"
) -> Path:
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    if decisions:
        (path / "decisions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in decisions))
    if config:
        (path / "config.yaml").write_text(config)
    return path


def steps(first: int, last: int, undone: int = 0, **fields: Any) -> list[Record]:
    """Steps first..last of a run that had undone this many before."""
    return [
        train(step, step + undone, discarded_tokens=8 * undone, **fields) for step in range(first, last + 1)
    ]


def failed_trial_run(path: Path) -> Path:
    """Ten steps, five more as a trial that fails, and ten that take their place."""
    metrics = [*steps(1, 10), *steps(11, 15, scale=3.0, phase="trial"), *steps(11, 20, undone=5, scale=0.5)]
    decisions = [
        decision("trial_started", 10, 10, 1.0, 3.0, snapshot_seconds=0.25),
        decision("failed", 10, 15, 3.0, 0.5, discarded_steps=5, snapshot_seconds=0.5),
    ]
    return write(path, metrics, decisions)


def test_a_plain_run_is_all_kept(tmp_path: Path) -> None:
    metrics = [run_event("start", 0, 0, 100.0), *steps(1, 4), evaluation(4, 4), run_event("end", 4, 4, 106.0)]
    run = read_run(write(tmp_path, metrics, config="lr: 1.0e-4\nadalrs:\n  mode: 'off'\n"))

    assert run.train.step.tolist() == [1, 2, 3, 4]
    assert run.train.kept.all() and run.train.applied.all()
    assert np.isnan(run.train.grad_norm).all()
    assert run.config == {"lr": 1e-4, "adalrs": {"mode": "off"}}
    assert [e.loss for e in run.evaluations] == [4.0]
    assert run.decisions == run.trials == ()
    assert run.scale == 1.0
    assert (run.totals.useful_steps, run.totals.discarded_steps, run.totals.total_steps) == (4, 0, 4)
    assert (run.totals.useful_tokens, run.totals.discarded_tokens) == (32, 0)
    assert run.totals.wall_seconds == 6.0


def test_the_steps_of_a_failed_trial_are_not_kept(tmp_path: Path) -> None:
    run = read_run(failed_trial_run(tmp_path))

    assert run.train.total_steps[~run.train.kept].tolist() == [11, 12, 13, 14, 15]
    assert run.train.step[run.train.kept].tolist() == list(range(1, 21))
    (trial,) = run.trials
    assert (trial.start_step, trial.first_total_step, trial.last_total_step) == (10, 11, 15)
    assert (trial.verdict, trial.length) == ("failed", 5)
    assert (trial.scale_before, trial.scale_trial, trial.scale_after) == (1.0, 3.0, 0.5)
    assert (run.totals.useful_steps, run.totals.discarded_steps, run.totals.total_steps) == (20, 5, 25)
    assert (run.totals.useful_tokens, run.totals.discarded_tokens, run.totals.total_tokens) == (160, 40, 200)
    assert run.totals.snapshot_seconds == 0.75
    assert run.scale == 0.5


@pytest.mark.parametrize("verdict", ["neutral", "aborted", "interrupted"])
def test_a_run_may_end_right_after_an_undone_trial(tmp_path: Path, verdict: str) -> None:
    metrics = [*steps(1, 10), *steps(11, 15, scale=3.0)]
    decisions = [decision("trial_started", 10, 10, 1.0, 3.0), decision(verdict, 10, 15, 3.0, 1.0)]
    run = read_run(write(tmp_path, metrics, decisions))

    assert run.train.step[run.train.kept].tolist() == list(range(1, 11))
    assert (run.totals.useful_steps, run.totals.discarded_steps) == (10, 5)
    assert (run.totals.useful_tokens, run.totals.discarded_tokens) == (80, 40)
    assert run.scale == 1.0


def test_the_steps_of_an_accepted_trial_are_kept(tmp_path: Path) -> None:
    decisions = [decision("trial_started", 10, 10, 1.0, 3.0), decision("accepted", 15, 15, 3.0, 3.0)]
    run = read_run(write(tmp_path, [*steps(1, 10), *steps(11, 15, scale=3.0)], decisions))

    assert run.train.kept.all()
    assert [trial.verdict for trial in run.trials] == ["accepted"]
    assert run.totals.discarded_steps == 0


@pytest.mark.parametrize(("event", "back_to"), [("loss_guard_stopped", 4), ("loss_guard_skipped", 9)])
def test_loss_guard_rewind_at_the_end_is_not_kept(tmp_path: Path, event: str, back_to: int) -> None:
    decisions = [decision(event, back_to, 10, 1.0, 1.0, discarded_steps=10 - back_to, snapshot_seconds=2.0)]
    run = read_run(write(tmp_path, steps(1, 10), decisions))

    assert run.train.step[run.train.kept].tolist() == list(range(1, back_to + 1))
    assert (run.totals.useful_steps, run.totals.discarded_steps) == (back_to, 10 - back_to)
    assert (run.totals.useful_tokens, run.totals.discarded_tokens) == (8 * back_to, 8 * (10 - back_to))
    assert run.totals.snapshot_seconds == 0.0  # a search's own


def test_loss_guard_in_one_arm_leaves_the_other(tmp_path: Path) -> None:
    """From step 10 on a control to 14, and back to 10; a step skipped there; then back to the control's
    end."""
    metrics = [*steps(1, 14), *steps(11, 13, undone=4), *steps(13, 13, undone=5), *steps(15, 16, undone=4)]
    decisions = [
        decision("control_started", 10, 10, 1.0, 1.0, capture="a"),
        decision("failed", 10, 14, 1.0, 0.1, capture="b", restore="a"),
        decision("loss_guard_skipped", 12, 17, 0.1, 0.1, discarded_steps=1),
        decision("aborted", 14, 18, 0.1, 1.0, restore="b", discarded_steps=3),
    ]
    run = read_run(write(tmp_path, metrics, decisions))

    assert run.train.step[run.train.kept].tolist() == list(range(1, 17))
    assert run.train.total_steps[run.train.kept].tolist() == [*range(1, 15), 19, 20]


def test_a_trial_under_way_is_running(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, steps(1, 13), [decision("trial_started", 10, 10, 1.0, 3.0)]))

    assert [(trial.verdict, trial.length, trial.scale_after) for trial in run.trials] == [("running", 3, 3.0)]
    assert run.train.kept.all()


def test_an_evaluation_in_an_undone_trial_is_dropped(tmp_path: Path) -> None:
    run_dir = failed_trial_run(tmp_path)
    with (run_dir / "metrics.jsonl").open("a") as file:
        for record in (
            evaluation(13, 13, loss=9.0),
            evaluation(10, 15, loss=4.5),
            evaluation(20, 25, loss=4.0),
        ):
            file.write(json.dumps(record) + "\n")

    assert [e.loss for e in read_run(run_dir).evaluations] == [4.5, 4.0]


def test_a_resume_drops_steps_after_its_checkpoint(tmp_path: Path) -> None:
    metrics = [
        run_event("start", 0, 0, 100.0),
        *steps(1, 20),
        evaluation(15, 15, loss=1.0),
        run_event("resume", 12, 12, 500.0),
        *steps(13, 30, loss=2.0, time=501.0),
    ]
    decisions = [
        decision("window", 10, 10, 1.0, 1.0),
        decision("scaled_down", 18, 18, 1.0, 0.5),
        decision("window", 25, 25, 1.0, 1.0, time=501.0),
    ]
    run = read_run(write(tmp_path, metrics, decisions))

    assert run.train.step.tolist() == list(range(1, 31))
    assert (run.train.loss[12:] == 2.0).all() and (run.train.loss[:12] != 2.0).all()
    assert [d.step for d in run.decisions] == [10, 25]
    assert run.evaluations == ()
    assert run.totals.lost_steps == 8
    assert run.totals.total_steps == 30
    assert run.totals.wall_seconds == pytest.approx(20 + 1)


def test_an_interrupted_trial_is_repeated_after_resume(tmp_path: Path) -> None:
    metrics = [
        *steps(1, 13),
        run_event("interrupted", 10, 13, 114.0),
        run_event("resume", 10, 13, 500.0),
        *steps(11, 18, undone=3, time=501.0),
    ]
    decisions = [
        decision("trial_started", 10, 10, 1.0, 3.0),
        decision("interrupted", 10, 13, 3.0, 3.0),
        decision("trial_started", 10, 13, 1.0, 3.0, time=500.5),
        decision("accepted", 15, 18, 3.0, 3.0, time=501.0),
    ]
    run = read_run(write(tmp_path, metrics, decisions))

    assert [(t.verdict, t.first_total_step, t.last_total_step) for t in run.trials] == [
        ("interrupted", 11, 13),
        ("accepted", 14, 18),
    ]
    assert run.train.step[run.train.kept].tolist() == list(range(1, 19))
    assert (run.totals.useful_steps, run.totals.discarded_steps, run.totals.lost_steps) == (18, 3, 0)


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', '{"kind": "train", "st\n', "\0\0\0"])
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: str) -> None:
    run_dir = failed_trial_run(tmp_path)
    for name in ("metrics.jsonl", "decisions.jsonl"):
        with (run_dir / name).open("a") as file:
            file.write(torn)

    assert read_run(run_dir).totals.total_steps == 25


def test_non_finite_losses_are_read_unchanged(tmp_path: Path) -> None:
    metrics = steps(1, 4)
    for record, loss in zip(metrics, (math.nan, math.inf, -math.inf, None), strict=True):
        record["loss"] = loss
    loss = read_run(write(tmp_path, metrics)).train.loss

    assert np.isnan(loss[[0, 3]]).all()
    assert loss[1] == math.inf and loss[2] == -math.inf


@pytest.mark.parametrize("name", ["metrics.jsonl", "decisions.jsonl"])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, name: str) -> None:
    run_dir = failed_trial_run(tmp_path)
    file = run_dir / name
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:20], *lines[2:], lines[0]]) + "\n")

    with pytest.raises(ValueError, match=rf"{name}:2: Invalid JSON"):
        read_run(run_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "low"}, "metrics.jsonl:3: loss: .*number"),
        ({"step": 2.5}, "metrics.jsonl:3: step: .*integer"),
        ({"kind": "training"}, "metrics.jsonl:3: .*'training'"),
    ],
)
def test_a_wrong_field_is_named_even_in_the_last_line(tmp_path: Path, change: Record, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_run(write(tmp_path, [*steps(1, 2), train(3, 3) | change]))


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    record = train(1, 1)
    del record["consumed_tokens"]

    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: consumed_tokens: .*required"):
        read_run(write(tmp_path, [record, *steps(2, 3)]))


def test_what_is_no_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such run directory"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"contains no metrics\.jsonl"):
        read_run(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="required a run directory"):
        read_run(tmp_path / "file")


@pytest.mark.parametrize("content", ["", '{"kind":"ru', json.dumps(run_event("start", 0, 0, 1.0)) + "\n"])
def test_a_run_without_any_step_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)

    with pytest.raises(ValueError, match=r"metrics\.jsonl: no training step"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"), [("lr: [1", "not valid YAML"), ("- lr\n", "required a mapping")]
)
def test_a_broken_configuration_is_refused(tmp_path: Path, config: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"config\.yaml: {message}"):
        read_run(write(tmp_path, steps(1, 2), config=config))


def test_reading_and_reporting_need_no_torch() -> None:
    code = "import sys, megatron_adalrs.report; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode
        == 0
    )
