"""Output folders are checked by writing to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_adalrs.run_directory import require_writable


@pytest.mark.parametrize("place", ["file", "file/inside"])
def test_file_is_not_a_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"^save: .*{tmp_path / place}.*(not a folder|Not a directory)"):
        require_writable(tmp_path / place, "save")


def test_folder_that_cannot_be_created_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^tensorboard_dir: cannot write to /proc/runs: "):
        require_writable(Path("/proc/runs"), "tensorboard_dir")


def test_the_check_leaves_nothing(tmp_path: Path) -> None:
    require_writable(tmp_path / "a/b", "save")
    assert not list(tmp_path.iterdir())
