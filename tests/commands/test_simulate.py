from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.programs import Done, called


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    return called("simulate", monkeypatch, capsys)


def test_a_table_and_a_plot(simulate: Callable[..., Done], tmp_path: Path) -> None:
    plot = tmp_path / "plot.html"
    done = simulate("--train-iters", "800", "--runs", "2", "--initial", "0.1", "1", "--plot", plot)
    assert (done.returncode, done.stderr) == (0, "")
    for part in (
        "800 steps, cosine",
        "paper: within a factor of 2",
        "robust: within a factor of 2",
        "0.17",
        "per minute",
    ):
        assert part in done.stdout
    assert "probability of ending within a factor of 2" in plot.read_text()


def test_cells_as_json(simulate: Callable[..., Done]) -> None:
    flags = (
        "--block 2 --runs 3 --noise 0.1 0.2 --lengths 1 40 --initial 0.1 --adalrs.mode robust "
        "--schedule WSD --json"
    )
    done = simulate(*flags.split())
    assert done.returncode == 0
    cells = json.loads(done.stdout)["cells"]
    assert [(cell["noise"], cell["length"]) for cell in cells] == [
        (0.1, 1.0),
        (0.1, 40.0),
        (0.2, 1.0),
        (0.2, 40.0),
    ]
    fitting, too_long = cells[0], cells[1]
    assert fitting["within_two"] == 1.0 and fitting["gained"] > 0.1 and 0 < fitting["discarded"] < 0.4
    assert "30+30+24" in fitting["steps"] and too_long["within_two"] is None


def test_noise_and_descent_of_a_recorded_loss(simulate: Callable[..., Done], tmp_path: Path) -> None:
    steps = np.arange(1, 1001)
    losses = 1.5 + 3 * (1 + steps / 20) ** -0.5 + 0.05 * np.random.default_rng(0).standard_normal(1000)
    record = tmp_path / "loss.csv"
    record.write_text(
        "step,loss\n" + "".join(f"{step},{loss}\n" for step, loss in zip(steps, losses, strict=True))
    )
    done = simulate("--like", record, "--runs", "1", "--train-iters", "800", "--lengths", "1", "--json")
    assert done.returncode == 0
    surface = json.loads(done.stdout)["surface"]
    assert surface["noise"] == pytest.approx(0.05, rel=0.15)
    assert surface["floor"] < losses.min()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-iters", "50"], "is step 5"),
        (["--noise", "-1"], "--noise=-1.0: must be at least 0"),
        (["--initial", "0"], "--initial=0.0: must be above 0"),
        (["--runs", "0"], "--runs=0: must be above 0"),
        (["--like", "{tmp}/nothing.csv"], "nothing.csv: no such file or folder"),
        (["--plot", "{tmp}/missing/a.html"], "missing does not exist"),
        (["--adalrs.beta", "1"], "adalrs.beta=1.0 must be above 1"),
    ],
)
def test_a_mistake_is_one_sentence(
    simulate: Callable[..., Done], tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = simulate(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
