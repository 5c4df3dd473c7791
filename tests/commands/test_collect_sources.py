from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "collect_sources.py", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_collects_only_the_standard_library(tmp_path: Path) -> None:
    done = run("--output", tmp_path / "new" / "a.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    records = [json.loads(line) for line in (tmp_path / "new" / "a.jsonl").read_bytes().splitlines()]
    paths = [record["path"] for record in records]
    library = Path(sysconfig.get_path("stdlib"))
    assert paths == sorted(paths)
    assert {"abc.py", "json/decoder.py"} <= set(paths)
    assert all(
        path.endswith(".py") and "site-packages" not in path and "__pycache__" not in path for path in paths
    )
    assert all(record["text"].encode() == (library / record["path"]).read_bytes() for record in records[:50])
    assert f"{len(records)} files, " in done.stdout
    assert f" {sum(len(record['text'].encode()) for record in records)} bytes" in done.stdout


def test_the_same_bytes_every_time_and_a_limit(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("--output", tmp_path / name, "--limit-mb", "0.5").returncode == 0
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    assert 250_000 < sum(len(json.loads(line)["text"].encode()) for line in content.splitlines()) <= 500_000


def test_errors_exit_with_2_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("before")
    for arguments in (["--output", tmp_path / "a", "--limit-mb", "0"], ["--output", tmp_path / "a" / "b"]):
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "before")]
