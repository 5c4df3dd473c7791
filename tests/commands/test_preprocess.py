from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_adalrs.data.indexed_dataset import IndexedDataset

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "preprocess_data.py", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.fixture
def command(tmp_path: Path) -> list[str | Path]:
    (tmp_path / "x.jsonl").write_text('{"body": "one"}\n{"body": ""}\n{"body": "three"}\n')
    return [
        "--input",
        tmp_path / "x.jsonl",
        "--output-prefix",
        tmp_path / "out",
        "--tokenizer-type",
        "ByteTokenizer",
        "--json-keys",
        "body",
    ]


def test_reports_what_it_made(command: list[str | Path], tmp_path: Path) -> None:
    done = run(*command, "--workers", "2", "--no-append-eod")
    assert (done.returncode, done.stderr) == (0, "")
    assert "out: 2 documents (1 empty ones skipped), 8 tokens of type uint16, " in done.stdout
    assert "tokens/s" in done.stdout
    assert IndexedDataset(tmp_path / "out").get(1).tolist() == [*b"three"]


def test_existing_output_needs_overwrite(command: list[str | Path]) -> None:
    assert run(*command).returncode == 0
    refused = run(*command)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: output ")
    assert refused.stderr.count("\n") == 1
    assert run(*command, "--overwrite").returncode == 0


def test_bad_input_is_one_line_and_exit_code_2(command: list[str | Path], tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "one"}\nbroken\n')
    done = run(*command)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path}/x.jsonl:2: malformed JSON")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*out*"))


def test_unknown_flag_is_exit_code_2(command: list[str | Path]) -> None:
    done = run(*command, "--worker", "2")
    assert done.returncode == 2
    assert "--workers" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_line_is_fixed_and_the_command_resumes(command: list[str | Path], tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    good = [json.dumps({"body": f"{number} " * 500}) + "\n" for number in range(1000)]
    source.write_text("".join([*good[:899], "broken\n", *good[900:]]))
    for told in ("", "continuing from "):
        done = run(*command)
        assert done.returncode == 2 and done.stderr.startswith(told)
        assert f"error: {source}:900: malformed JSON" in done.stderr
    source.write_text("".join([*good[:3], good[4], *good[4:]]))
    done = run(*command)
    assert done.returncode == 2
    assert re.search(
        r"input file x\.jsonl .*, and not only behind what is done, its first [1-8]\d\d lines", done.stderr
    )
    source.write_text("".join(good))
    done = run(*command, "--workers", "2")
    assert done.returncode == 0 and done.stderr.startswith("continuing from ")
    command[command.index(tmp_path / "out")] = tmp_path / "whole"
    assert run(*command).returncode == 0
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"out.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()
