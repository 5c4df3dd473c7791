from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.programs import ROOT, Done, called


@pytest.fixture
def replay(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    return called("replay", monkeypatch, capsys)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    noise = 0.1 * np.random.default_rng(0).standard_normal(1000)
    rows = [f"{step},{2 + 3 / (1 + step / 50) + noise[step - 1]}" for step in range(1, 1001)]
    path = tmp_path_factory.mktemp("replay") / "loss.csv"
    path.write_text("\n".join(["step,loss", *rows, ""]))
    return path


def test_both_modes_on_a_terminal(replay: Callable[..., Done], record: Path) -> None:
    done = replay(record)
    assert (done.returncode, done.stderr) == (0, "")
    for part in (
        "1000 losses",
        "paper over 1000 steps searches from step 100 to 400 in windows of 25",
        "discarding at",
        "races scales from step 100 to 400",
        "so the losses of trials are not recorded",
        "assumed",
        "smallest gain",
        "Precision with other lengths",
    ):
        assert part in " ".join(done.stdout.split())


def test_json_under_the_settings_of_a_run(replay: Callable[..., Done], record: Path) -> None:
    flags = (
        "--train-iters",
        "2000",
        "--adalrs.window",
        "30",
        "--adalrs.search-end",
        "0.45",
        "--unpaired",
        "0.3",
    )
    done = replay(record, *flags, "--json")
    assert done.returncode == 0
    content = json.loads(done.stdout)
    paper = content["paper"]
    assert "windows of 30" in paper["plan"] and "step 200 to 900" in paper["plan"]
    assert paper["noise"] == pytest.approx(0.1, rel=0.1)
    decisions = paper["scenarios"][0]["decisions"]
    assert decisions[0]["step"] == 170 and decisions[0]["velocity"] is not None
    assert "robust" not in content
    assert "adalrs.window: belongs to adalrs.mode=paper" in content["refused"][0]
    alone = json.loads(replay(record, "--adalrs.mode", "robust", "--unpaired", "0.3", "--json").stdout)[
        "robust"
    ]
    assert [one["arms"] for one in alone["scenarios"]] == ["equal", "better", "worse"]
    assert alone["unpaired"] == 0.3
    assert not math.isnan(alone["lengths"][1]["least"])
    assert alone["lengths"][0]["least"] > alone["lengths"][2]["least"]


def test_a_record_before_the_search_has_no_noise(
    replay: Callable[..., Done], record: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.csv"
    short.write_text("\n".join(record.read_text().splitlines()[:102]))
    flags = (short, "--train-iters", "1000")
    assert json.loads(replay(*flags, "--json").stdout, parse_constant=pytest.fail)["paper"]["noise"] is None
    assert "noise of a single loss during the search: unknown" in " ".join(replay(*flags).stdout.split())


def test_one_loss_in_ten_steps_stands_for_ten(
    replay: Callable[..., Done], record: Path, tmp_path: Path
) -> None:
    every = record.read_text().splitlines()
    sparse = tmp_path / "sparse.csv"
    sparse.write_text(
        "\n".join(["step,loss", *(f"{10 * int(row.split(',')[0])},{row.split(',')[1]}" for row in every[1:])])
    )
    one, ten = (
        json.loads(replay(path, "--adalrs.mode", "paper", "--json").stdout)["paper"]
        for path in (record, sparse)
    )
    assert (ten["train_iters"], ten["interval"]) == (10_000, 10)
    for first, second in zip(one["scenarios"][0]["decisions"], ten["scenarios"][0]["decisions"], strict=True):
        assert (second["event"], second["step"]) == (first["event"], 10 * first["step"])
        assert (second["velocity"] is None) == (first["velocity"] is None)
        assert second["velocity"] is None or second["velocity"] == pytest.approx(first["velocity"] / 10)
    assert "one loss every 10 steps" in ten["basis"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nothing.csv"], "nothing.csv: no such file or folder"),
        (["{record}", "--column", "lose"], "--column=lose: "),
        (["{record}", "--train-iters", "20000"], "ends at step 1000, before the search begins at step 2000"),
        (["{record}", "--adalrs.alpha", "0.5"], "adalrs.alpha=0.5 must be above 1"),
        (
            ["{record}", "--adalrs.mode", "robust", "--adalrs.window", "30"],
            "adalrs.window: belongs to adalrs.mode=paper, but adalrs.mode is robust",
        ),
        (["{record}", "--adalrs.mode", "paper", "--lr-warmup-iters", "95"], "during the warm-up of 95 steps"),
        (["{record}", "--unpaired", "-1"], "--unpaired=-1.0: must be at least 0"),
        (["{tmp}/nan.csv"], "nan.csv, loss: contains no finite loss"),
        (
            ["{tmp}/coarse.csv", "--adalrs.mode", "robust"],
            "one loss every 100 steps is too coarse for this search",
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    replay: Callable[..., Done], record: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "nan.csv").write_text("loss\n" + "nan\n" * 1000)
    (tmp_path / "coarse.csv").write_text(
        "step,loss\n" + "".join(f"{step},2\n" for step in range(100, 10_001, 100))
    )
    done = replay(*(argument.format(tmp=tmp_path, record=record) for argument in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.path.insert(0, 'tools'); import replay, simulate\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
