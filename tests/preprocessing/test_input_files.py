"""Folders of a corpus that cannot be listed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_adalrs.preprocessing.documents import find_files


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")
    locked = tmp_path / "locked"
    locked.mkdir()
    listed = os.scandir

    def denied(path: str | Path) -> object:
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ValueError, match="locked: the folder cannot be listed: Permission denied"):
        find_files(tmp_path, "**/*.txt")
    assert find_files(tmp_path, "*.txt")
