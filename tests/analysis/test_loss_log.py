from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_adalrs.analysis.loss_log import read_loss_log


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "step,loss,lr\n1,5.0,1e-3\n2,4.5,1e-3\n3,4.25,1e-3\n"),
        ("a.tsv", "iteration\tlm loss\n0\t5\n1\t4.5\n2\t4.25\n"),
        ("semicolons.csv", "Loss;Step\n5;1\n4.5;2\n4.25;3\n"),
        (
            "wandb.csv",
            "Step,run - train/loss,run - train/loss__MIN,run - val_loss\n1,5,5,\n2,4.5,4,6\n3,4.25,4,\n",
        ),
        ("tensorboard.csv", "Wall time,Step,Value\n17.5,1,5\n18.5,2,4.5\n19.5,3,4.25\n"),
        ("bare.csv", "5.0\n4.5\n4.25\n"),
        ("no_steps.csv", "loss\n5.0\n4.5\n4.25\n"),
        ("resumed.csv", "step,loss\n1,5.0\n2,9\n3,9\n2,4.5\n3,4.25\n"),
        (
            "a.jsonl",
            '{"step": 1, "train_loss": 5}\n\n{"step": 2, "train_loss": 4.5}\n{"train_loss": 4.25, "step": 3}',
        ),
        (
            "with_evaluations.jsonl",
            '{"kind": "train", "step": 1, "loss": 5}\n{"kind": "eval", "step": 1, "loss": 9}\n'
            '{"kind": "train", "step": 2, "loss": 4.5}\n{"kind": "train", "step": 3, "loss": 4.25}\n{"kind": '
            '"tr',
        ),
    ],
    ids=lambda value: value if "\n" not in value else "",
)
def test_loss_is_found_in_files_of_other_programs(tmp_path: Path, name: str, text: str) -> None:
    log = read_loss_log(written(tmp_path, name, text))
    assert log.losses.tolist() == [5.0, 4.5, 4.25]
    assert (log.interval, log.steps) == (1, 3)


def test_column_can_be_chosen(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "step,loss,other\n1,5,1\n2,4,2\n")
    assert read_loss_log(path, column="other").losses.tolist() == [1.0, 2.0]


def test_interval_between_losses_is_recognized(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "step,loss\n10,5\n20,4\n40,3\n50,2\n")
    log = read_loss_log(path)
    assert (log.interval, log.steps) == (10, 50)
    assert np.array_equal(log.losses, [5, 4, math.nan, 3, 2], equal_nan=True)


def test_nan_and_infinity_are_kept(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": 5}',
        '{"step": 2, "loss": null}',
        '{"step": 3, "loss": NaN}',
        '{"step": 5, "loss": 4}',
    ]
    for name, text in (("a.jsonl", "\n".join(lines)), ("a.csv", "step,loss\n1,5\n2,nan\n3,NaN\n5,4\n")):
        log = read_loss_log(written(tmp_path, name, text))
        assert np.array_equal(log.losses, [5, math.nan, math.nan, math.nan, 4], equal_nan=True)
    infinite = read_loss_log(written(tmp_path, "b.csv", "step,loss\n1,5\n2,inf\n"))
    assert infinite.losses.tolist() == [5.0, math.inf]


def train_row(step: int, total_steps: int, loss: float, phase: str = "watch") -> str:
    row = {"kind": "train", "step": step, "total_steps": total_steps, "loss": loss, "lr": 1e-3, "scale": 1.0}
    return json.dumps(row | {"consumed_tokens": step, "discarded_tokens": 0, "phase": phase, "time": 1.0})


@pytest.mark.parametrize("given", [".", "metrics.jsonl"])
def test_own_run_is_read_as_its_kept_steps(tmp_path: Path, given: str) -> None:
    rows = [train_row(1, 1, 5.0), train_row(2, 2, 4.5), train_row(3, 3, 9.0, "trial"), train_row(3, 4, 4.25)]
    written(tmp_path, "metrics.jsonl", "\n".join(rows) + "\n")
    common = {"scale_before": 1.0, "scale_after": 1.0, "time": 1.0}
    decisions = [
        {"event": "trial_started", "step": 2, "total_steps": 2, "capture": "trial"} | common,
        {"event": "neutral", "step": 2, "total_steps": 3, "restore": "trial", "discarded_steps": 1} | common,
    ]
    written(tmp_path, "decisions.jsonl", "".join(json.dumps(one) + "\n" for one in decisions))
    log = read_loss_log(tmp_path / given)
    assert log.losses.tolist() == [5.0, 4.5, 4.25]
    assert log.run is not None and len(log.run.train.loss) == 4


def test_tensorboard_folder(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    writer = tensorboard.SummaryWriter(str(tmp_path / "tb"))
    for step in range(1, 5):
        writer.add_scalar("train/loss", 5.0 - step, 10 * step)
        writer.add_scalar("valid/loss", 9.0, 10 * step)
        writer.add_scalar("other", float(step), step)
    writer.close()
    log = read_loss_log(tmp_path / "tb")
    assert (log.losses.tolist(), log.interval) == ([4.0, 3.0, 2.0, 1.0], 10)
    assert read_loss_log(tmp_path / "tb", tag="other").losses.tolist() == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(ValueError, match=r"--tag=loss: .* has no such tag; it has .*train/loss"):
        read_loss_log(tmp_path / "tb", tag="loss")
    with pytest.raises(
        ValueError, match=r"neither metrics.jsonl nor TensorBoard event files; there are some in .*tb"
    ):
        read_loss_log(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "column", "message"),
    [
        ("a.csv", "", None, r"a.csv: is empty"),
        ("a.csv", "\n \n", None, r"a.csv: is empty"),
        (
            "a.csv",
            "step,reward,lr\n1,2,3\n",
            None,
            r"no column is recognized as the training loss: .* it has reward, lr",
        ),
        (
            "a.csv",
            "step,loss_a,loss_b\n1,2,3\n",
            None,
            r"2 columns could be the training loss: .*loss_a, loss_b",
        ),
        ("a.csv", "1,5.0\n2,4.0\n", None, r"no column is recognized as .* it has 1, 2"),
        ("a.csv", "step,loss\n1,2\n", "lose", r"--column=lose: .* has no such column; it has loss"),
        ("a.csv", "step,loss\n1,2\n2,much\n", None, r"a.csv:3: loss: 'much' must be a number"),
        ("a.csv", "step,loss\n1,2\n1.5,2\n", None, r"a.csv:3: step: '1.5' must be a whole number of steps"),
        ("a.csv", "step,loss\n1,2\n", None, r"contains 1 loss\(es\), at least 2 are required"),
        ("a.csv", "step,loss\n", None, r"contains 0 loss\(es\), at least 2 are required"),
        ("a.jsonl", '{"step": 1}\n{"step: 2}\n{"step": 3}\n', None, r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"loss": 1}\n3\n', None, r"a.jsonl:2: must be an object with a loss, not int"),
        ("a.jsonl", '{"loss": true}\n{"loss": 3}\n', None, r"a.jsonl:1: loss: True must be a number"),
        (
            "copy.jsonl",
            train_row(1, 1, 5.0) + "\n",
            None,
            r"contains undone steps: give the output folder of that run",
        ),
    ],
)
def test_file_without_a_loss_is_rejected(
    tmp_path: Path, name: str, text: str, column: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_loss_log(written(tmp_path, name, text), column)


def test_missing_file_or_wrong_option_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_loss_log(tmp_path / "nothing.csv")
    with pytest.raises(ValueError, match="--tag=a: is only for a folder with TensorBoard files"):
        read_loss_log(written(tmp_path, "a.csv", "loss\n1\n2\n"), tag="a")
    with pytest.raises(ValueError, match="--column=a: is only for CSV and JSON-lines files"):
        read_loss_log(tmp_path, column="a")
