"""`megatron-adalrs reproduce`: small experiments, files for a cluster, and mistakes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_adalrs.reproduction import cluster, corpus, results, runner
from megatron_adalrs.reproduction.plan import Run
from tests.reproduction.made import SMOKE

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(ROOT / "tools" / "reproduce_paper.py")]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def reproduce(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
        cwd=ROOT,
    )


def test_prose_is_docstrings() -> None:
    source = (
        '"""Top."""\nx = "no prose"\nclass A:\n    """Of a class."""\n    def f(self):\n        """Of '
        "a "
        'method."""\n'
    )
    assert corpus.prose_of(source) == "Top.\n\nOf a class.\n\nOf a method."
    assert corpus.prose_of("topics = {'a': 'long text', 'b': 'word'}", every_text=True) == "long text"
    assert corpus.prose_of("print 'of another Python'") == ""


def test_a_second_call_runs_only_what_is_missing(tmp_path: Path) -> None:
    arguments = ["--scale", "smoke", "--rates", "3e-3", "--initial-rates", "1"]
    arguments += ["--experiments", "search", "continual"]
    arguments += ["--jobs", "2", "--output", str(tmp_path / "out")]
    command = [*PROGRAM, *arguments]
    with subprocess.Popen(
        command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as first:
        assert any("fixed" in line and "validation loss" in line for line in first.stdout)
        os.killpg(first.pid, signal.SIGKILL)
    done = list(tmp_path.glob("out/runs/*fixed*/result.json"))
    kept = done[0].stat().st_mtime_ns

    again = reproduce(*arguments)
    assert (again.returncode, again.stderr) == (0, "")
    assert "1 runs, 1 of them complete" in again.stdout
    assert done[0].stat().st_mtime_ns == kept
    assert "| fixed, mean | +0.000 |" in again.stdout

    found = [results.load(file) for file in sorted(tmp_path.glob("out/runs/*/result.json"))]
    methods = [(each.run.study, each.run.method) for each in found]
    assert methods == [("code", name) for name in ("fixed", "paper", "robust", "robust")] + [
        ("continual", name) for name in ("fixed", "fixed", "paper", "robust")
    ]
    by_method = {each.run.method: each for each in found if not each.run.settings and not each.run.source}
    assert by_method["robust"].discarded_steps > 0
    assert by_method["fixed"].discarded_steps == 0
    assert len(by_method["fixed"].curve) == 20
    assert by_method["fixed"].velocity > 0
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [float(row["valid"]) for row in rows] == [
        each["valid"] for each in json.loads((tmp_path / "out" / "results.json").read_text())
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Searches: code, cosine, 1 seed" in page
    assert "megatron_adalrs.commands.pretrain --config" in page
    weights = {
        json.loads(file.read_text().splitlines()[0])["weights_from"]
        for file in tmp_path.glob("out/runs/continual-*/metrics.jsonl")
    }
    assert weights == {
        str(tmp_path / "out" / "runs" / by_method["fixed"].name / "checkpoints" / "iter_0000200")
    }
    assert reproduce(*arguments).stdout.count("7 runs, 7 of them complete") == 1


def test_a_folder_is_locked(tmp_path: Path) -> None:
    with runner.lock(tmp_path), pytest.raises(ValueError, match=r"another reproduction works in it"):
        runner.lock(tmp_path, patience=0)
    runner.lock(tmp_path).close()


def test_a_failed_run_is_reported(tmp_path: Path) -> None:
    messages: list[str] = []
    with runner.lock(tmp_path) as held:
        failing = runner.Runner(tmp_path, SMOKE, {"code": tmp_path / "none"}, 2, held)
        assert failing.execute([Run("code", "cosine", "fixed", 3e-3, 10)], messages.append) == []
    (reason,) = failing.failures.values()
    assert reason.startswith("exit code 2: error: ")
    assert "failed" in messages[-1]


def test_a_cluster_gets_a_script_and_a_report(tmp_path: Path) -> None:
    output = tmp_path / "out"
    corpus.prepare_corpora(tmp_path, {"code"}, limit_mb=0.1)
    made = reproduce(
        "--scale", "7b", "--output", output, "--data-path", tmp_path / "code", "--schedules", "WSD"
    )
    assert (made.returncode, made.stderr) == (0, "")
    subprocess.run(["bash", "-n", output / "launch.sh"], check=True)
    planned = json.loads((output / "runs.json").read_text())
    assert len(planned) == len(list(output.glob("configs/*.yaml"))) == 9
    assert (output / "launch.sh").read_text().count("\ntrain qwen2.5-7b-WSD-") == 9

    nothing = reproduce("--scale", "7b", "--output", output, "--collect")
    assert (nothing.returncode, nothing.stdout) == (2, "")
    assert "none of the 9 runs" in nothing.stderr
    for entry in planned[:2]:
        leave_records(output / "runs" / entry["name"])
    collected = reproduce("--scale", "7b", "--output", output, "--collect")
    assert (collected.returncode, collected.stderr) == (0, "")
    page = (output / "report.html").read_text()
    assert "2 runs complete, 7 not" in page
    assert "Fixed rates: qwen2.5-7b, WSD" in page
    assert len(cluster.collect_cluster(output)[0]) == 2


def leave_records(folder: Path) -> None:
    """Write the records of a complete run of ten steps."""
    train = {
        "kind": "train",
        "lr": 1.0,
        "scale": 1.0,
        "consumed_tokens": 1,
        "discarded_tokens": 0,
        "phase": "fixed",
    }
    records = [train | {"step": n, "total_steps": n, "loss": 5.0 - n / 10, "time": n} for n in range(1, 11)]
    end = {"step": 10, "total_steps": 10, "time": 11}
    records.append({"kind": "eval", "split": "valid", "loss": 4.0, "perplexity": 55.0, **end})
    records.append({"kind": "run", "event": "end", **end})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "tiny", "--seeds", "0"], "--seeds: 0: at least 1 is required"),
        (["--scale", "tiny", "--first-seed", "-1"], "--first-seed: -1: at least 0 is required"),
        (["--scale", "tiny", "--jobs", "0"], "--jobs: 0: at least 1 is required"),
        (["--scale", "tiny", "--initial-rates", "1/0"], "--initial-rates: '1/0': a number or a fraction"),
        (["--scale", "1.5b", "--data-path", "x", "--methods", "paper"], "--methods: not with --scale 1.5b"),
        (["--scale", "tiny", "--initial-rates", "0"], "--initial-rates: 0: a number above 0"),
        (["--scale", "tiny", "--rates", "-1"], "--rates: -1: a number above 0"),
        (["--scale", "tiny", "--experiments", "nonsense"], "invalid choice: 'nonsense'"),
        (["--scale", "tiny", "--collect"], "--collect: not with --scale tiny"),
        (["--scale", "7b", "--experiments", "grid", "--collect"], "--experiments: not with --scale 7b"),
        (["--scale", "7b"], "--data-path: --scale 7b needs either a data set or --collect"),
        (["--scale", "7b", "--data-path", "nowhere"], "--data-path: nowhere: there is no "),
        (["--scale", "7b", "--collect"], "has no runs.json"),
        (["--scale", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = reproduce(*arguments, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "error: " in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
