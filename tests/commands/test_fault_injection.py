"""A small fault-injection campaign: nothing is lost, and all figures are reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_adalrs.commands import fault_injection


def test_three_kills_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--kills", "3", "--seed", "1", "--output", str(tmp_path / "campaign"), "--json"]
    assert fault_injection.main(flags) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["kills"] == sum(figures["victims"].values()) == sum(figures["interrupted"].values()) == 3
    assert figures["disturbances"]["second job"] >= 1
    assert figures["wrong"] == [] and figures["runs_completed"] == 1
    assert figures["attempts_resumed"] >= 1 and figures["checkpoints_read"] >= 3
    assert not (tmp_path / "campaign").exists()


def test_damage_and_lost_checkpoints_are_reported(tmp_path: Path) -> None:
    from megatron_adalrs.fault_injection.disk import check_checkpoints
    from tests.checkpoint.test_checkpoint import fake, flip_a_bit

    fake(tmp_path, 2)
    newest = fake(tmp_path, 4)
    (tmp_path / "latest").write_text("iter_0000004\n")
    assert check_checkpoints(tmp_path, 4).wrong == () and check_checkpoints(tmp_path, 4).newest == 4
    assert "had step 6 published, and now has none beyond 4" in check_checkpoints(tmp_path, 6).wrong[0]
    flip_a_bit(newest)
    wrong = check_checkpoints(tmp_path, 4).wrong
    assert "was published damaged: engine/weights.pt has SHA-256" in wrong[0] and "none beyond 2" in wrong[1]
    (tmp_path / "latest").write_text("iter_0000008\n")
    (tmp_path / ".iter_0000008.incomplete").mkdir()
    (tmp_path / ".iter_0000008.incomplete/manifest.json").touch()
    assert not any("latest names" in text for text in check_checkpoints(tmp_path, 2).wrong)
    (tmp_path / ".iter_0000008.incomplete/manifest.json").unlink()
    assert "names iter_0000008, which is not there" in check_checkpoints(tmp_path, 2).wrong[-1]


@pytest.mark.parametrize(("flags", "message"), [(["--kills", "0"], "--kills=0"), ([], "must be empty")])
def test_invalid_flags_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    (tmp_path / "something").touch()
    assert fault_injection.main([*flags, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
