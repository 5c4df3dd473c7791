"""A missing file of a corpus is named, with what its folder has instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_adalrs.data.vocabulary import resolve_vocabulary
from megatron_adalrs.planning.dry_run import dry_run
from tests.helpers.runs import tiny_config


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("corpsu", "there is no file .*corpsu.idx .* has .*/corpus($|;)"),
        ("corpus_text_document", "corpus_text_document.idx .* has .*/corpus($|;)"),
        ("corpus_text_document.bin", "corpus_text_document.idx .* has .*/corpus($|;)"),
        ("", "there is no file .* has .*/corpus, .*/other"),
        ("half", "there is no file .*half.bin .*; .*half.idx exists"),
        ("no/corpus", "there is no folder .*/no($|;)"),
        ("empty/corpus", "empty has no pairs($|;)"),
        ("1 corpus", "there is no file .*/1 corpus.idx"),
    ],
)
def test_a_missing_pair_is_named_first(tmp_path: Path, wrong: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("corpus.bin", "corpus.idx", "other.bin", "other.idx", "half.idx"):
        (tmp_path / name).touch()
    for values in ({"data_path": f"{tmp_path}/{wrong}"}, {"data_path": ["1", f"{tmp_path}/{wrong}"]}):
        for read in (resolve_vocabulary, dry_run):
            with pytest.raises(FileNotFoundError) as error:
                read(tiny_config(**values))
            assert re.search(f"^data_path: .*{message}", str(error.value))


def test_a_relative_path_names_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"data_path": None, "train_data_path": "data/corpus"}
    with pytest.raises(FileNotFoundError) as error:
        resolve_vocabulary(tiny_config(**values))
    assert str(error.value).startswith("train_data_path: ")
    assert str(error.value).endswith(f"there is no folder data; relative paths begin at {tmp_path}")
