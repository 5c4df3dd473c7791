from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    record = {
        "kind": "eval",
        "split": "valid",
        "step": 3,
        "total_steps": 3,
        "loss": 4,
        "perplexity": 55,
        "time": 1,
    }
    (directory / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return directory


def test_writes_into_the_first_run_directory(run_dir: Path) -> None:
    done = report(run_dir)

    assert (done.returncode, done.stderr) == (0, "")
    assert str(run_dir / "report.html") in done.stdout
    assert "4.0000" in (run_dir / "report.html").read_text()


def test_output_and_title(run_dir: Path, tmp_path: Path) -> None:
    done = report(run_dir, "--output", tmp_path / "page.html", "--title", "A title")

    assert done.returncode == 0
    assert "<h1>A title</h1>" in (tmp_path / "page.html").read_text()
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere"], "nowhere: no such run directory"),
        (["{tmp}"], "contains no metrics.jsonl"),
        (["{tmp}/run", "{tmp}/run"], "given twice"),
        (["{tmp}/run", "--output", "{tmp}/missing/page.html"], "missing does not exist"),
        (["{tmp}/run", "--output", "{tmp}"], "this is a folder"),
        ([], "RUN_DIR"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    run_dir: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = report(*[argument.format(tmp=tmp_path) for argument in arguments])

    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "error: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (run_dir / "report.html").exists()
