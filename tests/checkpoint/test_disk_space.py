"""The disk is checked for room before a run begins."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_adalrs.checkpoint.disk_space import estimate_checkpoint_bytes, require_space
from megatron_adalrs.utils.format import quantity


class Usage(NamedTuple):
    free: int


@pytest.mark.parametrize(("free", "outcome"), [(900, "refused"), (1500, "warned"), (3000, "quiet")])
def test_room_for_a_checkpoint_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, outcome: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(free))
    if outcome == "refused":
        with pytest.raises(ValueError, match=f"^save: the disk of .* has {quantity(free, 'B')} free, and a "):
            require_space(tmp_path / "not/there", 1000)
    else:
        warning = require_space(tmp_path / "not/there", 1000)
        assert (warning is None) == (outcome == "quiet") and (not warning or "nearly full" in warning)


def test_last_checkpoint_replaces_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "iter_0000010").mkdir()
    (tmp_path / "iter_0000010/weights").write_bytes(bytes(500))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(600))
    assert "nearly full" in str(require_space(tmp_path, 10**9))


def test_optimizer_states_are_estimated() -> None:
    assert estimate_checkpoint_bytes(100, "fp32") == 1200
    assert estimate_checkpoint_bytes(100, "bf16") == 1400
