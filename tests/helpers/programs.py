"""Calls of the program's commands in the process of the test."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Done(NamedTuple):
    """Exit code and output of a call."""

    returncode: int
    stdout: str
    stderr: str


def unwrapped(output: str) -> str:
    """Return the output of a run with each of its wrapped lines on one line."""
    return re.sub(r"\n {13}(?=\S)", " ", output)


def called(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Return a function that runs `megatron-adalrs NAME` with its arguments in this process."""
    monkeypatch.setattr(sys, "argv", [f"megatron-adalrs {name}"])
    program = importlib.import_module(f"megatron_adalrs.commands.{name}")

    def run(*arguments: str | Path) -> Done:
        return Done(program.main([*map(str, arguments)]), *capsys.readouterr())

    return run
