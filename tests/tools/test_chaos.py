"""The kill campaign for real, small: that nothing is lost, and every figure is there."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def chaos(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    specification = importlib.util.spec_from_file_location("chaos", TOOLS / "chaos.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "chaos", module)
    specification.loader.exec_module(module)
    return module


def test_three_kills_lose_nothing(chaos: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chaos.main(["--kills", "3", "--output", str(tmp_path / "campaign"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["kills"] == sum(figures["victims"].values()) == sum(figures["cut_short"].values()) == 3
    assert figures["wrong"] == [] and figures["runs_completed"] == 1
    assert figures["lives_resumed"] >= 1 and figures["checkpoints_read"] >= 3
    assert not (tmp_path / "campaign").exists()


def test_what_it_would_call_wrong(chaos: ModuleType, tmp_path: Path) -> None:
    from killing.disk import judge

    from tests.checkpoint.test_checkpoint import fake, flip_a_bit

    fake(tmp_path, 2)
    newest = fake(tmp_path, 4)
    (tmp_path / "latest").write_text("iter_0000004\n")
    assert judge(tmp_path, 4).wrong == () and judge(tmp_path, 4).newest == 4
    assert "had step 6 published, and now has none beyond 4" in judge(tmp_path, 6).wrong[0]
    flip_a_bit(newest)
    wrong = judge(tmp_path, 4).wrong
    assert "was published damaged: engine/weights.pt has SHA-256" in wrong[0] and "none beyond 2" in wrong[1]
    (tmp_path / "latest").write_text("iter_0000008\n")
    assert "names iter_0000008, which is not there" in judge(tmp_path, 2).wrong[-1]


@pytest.mark.parametrize(("flags", "message"), [(["--kills", "0"], "--kills=0"), ([], "must be empty")])
def test_what_is_impossible_is_refused(
    chaos: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    (tmp_path / "something").touch()
    assert chaos.main([*flags, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
