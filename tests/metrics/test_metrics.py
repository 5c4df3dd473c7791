"""What the sinks write."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_adalrs.metrics import ConsoleSink, JsonLines, Metrics, open_metrics
from megatron_adalrs.metrics.console_text import wrap
from megatron_adalrs.metrics.scalars import Scalars
from megatron_adalrs.metrics.tensorboard import EventFile


def train(step: int, phase: str = "watch", loss: float = 2.0) -> dict[str, Any]:
    return {
        "step": step,
        "total_steps": step,
        "loss": loss,
        "lr": 1e-3,
        "scale": 3.0,
        "phase": phase,
        "grad_norm": 0.5,
        "applied": True,
        "tokens_per_second": 12345.0,
        "flops_per_second": 2.5e12,
        "seconds": 0.5,
        "memory_bytes": 3e9,
        "consumed_tokens": 64 * step,
        "discarded_tokens": 0,
    }


def decision(event: str, step: int, restore: str | None = None) -> dict[str, Any]:
    return {
        "restore": restore,
        "event": event,
        "step": step,
        "total_steps": step,
        "velocity": 0.1,
        "gain": None,
        "scale_after": 3.0,
        "reason": f"why {event}",
    }


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def test_every_step_and_decision_is_a_line(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path, tmp_path / "tb", 10, 5, 0, is_first_rank=True)
    metrics.write("run", {"event": "start"})
    metrics.write("train", train(1, loss=math.nan))
    metrics.write("decision", decision("window", 1))
    metrics.close()
    run, step = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (run["kind"], run["event"]) == ("run", "start")
    assert step["step"] == 1
    assert math.isnan(step["loss"])
    (line,) = (tmp_path / "decisions.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "why window"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path, tmp_path / "tb", 10, 5, 0, is_first_rank=False)
    metrics.write("train", train(5))
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_a_torn_last_line_is_removed_before_writing(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text('{"a": 1}\n{"b": 2, "c')
    sink = JsonLines(file, frozenset({"run"}))
    sink.write("run", {"d": 3})
    sink.close()
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"a": 1}, {"d": 3}]


@pytest.mark.parametrize(
    ("event", "restore", "kept"),
    [
        ("accepted", None, [5, 10, 15]),
        ("failed", "trial", [5]),
        ("neutral", "trial", [5]),
        ("failed", None, [5, 10, 15]),
    ],
)
def test_tensorboard_shows_trials_once_they_are_kept(
    tmp_path: Path, event: str, restore: str | None, kept: list[int]
) -> None:
    board = Metrics([Scalars(EventFile(tmp_path, 0), 5)])
    board.write("train", train(5))
    board.write("decision", decision("trial_started", 5))
    for step in (10, 12, 15):
        board.write("train", train(step, phase="trial"))
    board.write("decision", decision("loss_guard_skipped", 15))  # which decides nothing about what waits
    board.write("decision", decision(event, 15, restore))
    board.write("eval", {"split": "valid", "step": 15, "loss": 1.5, "perplexity": 4.5})
    board.close()
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == kept
    assert [step for step, _ in scalars(tmp_path, "trial/loss")] == [10, 15]
    assert scalars(tmp_path, "valid/loss") == [(15, 1.5)]
    assert scalars(tmp_path, "train/lr")[0] == (5, pytest.approx(1e-3))


def test_resume_keeps_the_checkpoints_own_step(tmp_path: Path) -> None:
    for first, last in ((0, 30), (20, 30), (30, 40), (10, 15), (0, 5)):  # resumed, and twice rolled back
        metrics = open_metrics(tmp_path, tmp_path / "tb", 40, 5, first, is_first_rank=True)
        metrics.write("corpora", corpora(first))
        for step in range(first + 1, last + 1):
            metrics.write("train", train(step, loss=float(first)))
            if step % 10 == 0:
                metrics.write("corpora", corpora(step))
                metrics.write("eval", {"split": "valid", "step": step, "loss": 1.5, "perplexity": 4.5})
                metrics.write("decision", decision("window", step) | {"total_steps": step + 100})
        metrics.close()
        kept = list(range(10, last + 1, 10))
        for tag in ("valid/loss", "adalrs/scale", "corpora/a/tokens"):
            assert [step for step, _ in scalars(tmp_path / "tb", tag)] == kept
        losses = scalars(tmp_path / "tb", "train/loss")
        assert [step for step, _ in losses] == list(range(5, last + 1, 5))
        assert {loss for step, loss in losses if step > first} == {float(first)}


def corpora(step: int) -> dict[str, Any]:
    use = {"name": "a", "samples": step, "tokens": step, "epochs": 0.1}
    return {"step": step, "total_steps": step, "corpora": [use]}


def test_undone_steps_leave_no_points(tmp_path: Path) -> None:
    board = Metrics([Scalars(EventFile(tmp_path, 0), 5)])
    for step in range(1, 21):
        board.write("train", train(step))
    board.write("decision", decision("loss_guard_rewound", 10))
    board.write("train", train(15, loss=1.0))
    assert scalars(tmp_path, "train/loss") == [(5, 2.0), (10, 2.0), (15, 1.0)]
    for step in range(1, 21):  # a restart race, which is won: the new run is kept up to step 15
        board.write("train", train(step, phase="restart", loss=0.5))
    board.write("decision", decision("accepted", 15) | {"gain": 0.25})
    board.close()
    assert scalars(tmp_path, "train/loss") == [(5, 0.5), (10, 0.5), (15, 0.5)]
    assert scalars(tmp_path, "adalrs/gain") == [(15, 0.25)]


def test_executed_steps_are_a_curve_of_their_own(tmp_path: Path) -> None:
    board = Metrics([Scalars(EventFile(tmp_path, 0), 5)])
    board.write("train", train(5) | {"total_steps": 25})
    board.write("decision", decision("window", 5) | {"total_steps": 25})
    board.close()
    assert scalars(tmp_path, "train/executed_steps") == [(5, 25.0)]
    assert scalars(tmp_path, "adalrs/velocity") == [(5, pytest.approx(0.1))]


def test_console_lines_fit_and_begin_with_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    file = ConsoleSink(train_iters=100, log_interval=5, first_step=0)
    for step in range(1, 6):
        file.write("train", train(step, loss=float(step)))
    file.write("decision", decision("window", 5))
    file.write("decision", decision("trial_started", 5) | {"reason": "[see] " + "a reason " * 20})
    file.write("decision", decision("loss_guard_rewound", 5))
    file.write("eval", {"split": "valid", "step": 5, "loss": 1.5, "perplexity": 4.4817})
    file.write("run", {"message": f"done: 5 steps, checkpoint in {'/long' * 20}"})
    file.close()
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 or line.strip() == "/long" * 20 for line in lines)
    assert all(re.match(r"\d\d:\d\d:\d\d \S|             \S", line) for line in lines)
    texts = [line[9:] for line in lines]
    assert texts[0] == "step   5/100 | loss 3.0000 | lr 1.00e-03 | scale 3 | watching"
    assert texts[1] == "    grad norm 0.50 | 12.3 ktoken/s | 3 GB | elapsed 0:00, left 0:48"
    assert texts[2].startswith("AdaLRS trial started | [see] a reason")
    assert "loss guard rewound | why loss_guard_rewound" in texts
    assert "valid at step 5 | loss 1.5000 | perplexity 4.48" in texts
    assert texts[-1] == "    " + "/long" * 20


def test_rows_of_tables_are_not_broken() -> None:
    row = "rank  replica" + "  12.3 MB" * 8
    assert wrap(f"{row}\n{'word ' * 20}", "12:00:00 ").splitlines()[0] == f"12:00:00 {row}"


def test_printed_loss_is_the_mean_since_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    console = ConsoleSink(train_iters=100, log_interval=2, first_step=0)
    for step in range(1, 5):
        console.write("train", train(step, loss=float(step)))
    console.write("train", train(5, loss=100.0))
    console.write("decision", decision("trial_started", 5))
    console.write("train", train(6, loss=7.0, phase="trial"))
    assert re.findall(r"loss ([\d.]+)", capsys.readouterr().out) == ["1.5000", "3.5000", "7.0000"]


def test_steps_without_a_loss_are_not_averaged(capsys: pytest.CaptureFixture[str]) -> None:
    console = ConsoleSink(train_iters=100, log_interval=3, first_step=0)
    for step, loss in enumerate((1.0, None, 2.0, None, None, None), start=1):
        console.write("train", train(step) | {"loss": loss})
    printed = capsys.readouterr().out
    assert re.findall(r"loss ([\d.–]+)", printed) == ["1.5000", "–"]
    assert printed.count("step 2 has no loss and no update") == printed.count("has no loss") == 1


def test_steps_without_a_loss_have_no_scalar(tmp_path: Path) -> None:
    board = Metrics([Scalars(EventFile(tmp_path, 0), 5)])
    for step, phase in ((5, "watch"), (10, "trial")):
        board.write("train", train(step, phase) | {"loss": None})
    board.close()
    assert not scalars(tmp_path, "train/loss") and not scalars(tmp_path, "trial/loss")
    assert scalars(tmp_path, "train/grad_norm")


@pytest.mark.parametrize(
    ("phase", "words"), [("done", "search over"), ("before", "search to come"), ("fixed", None)]
)
def test_phases_are_in_words(capsys: pytest.CaptureFixture[str], phase: str, words: str | None) -> None:
    ConsoleSink(train_iters=1600, log_interval=210, first_step=0).write("train", train(210, phase))
    line = capsys.readouterr().out.splitlines()[0]
    assert line.endswith(f"scale 3 | {words}" if words else "lr 1.00e-03")


def test_total_budget_console_counts_executed_steps(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = ConsoleSink(train_iters=100, log_interval=5, first_step=0, budget="total")
    for step in range(1, 6):
        terminal.write("train", train(step) | {"total_steps": step + 3})
    printed = capsys.readouterr().out
    assert "step   5/100" in printed and "left 0:48" in printed
