"""Unfinished work that is another's, of another job, or damaged is refused and left as it is: see test_partial.py."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_adalrs.data.preprocess import Recipe, preprocess
from tests.data.test_partial import EVERYTHING, at_batch, corpus, kill_at, made, small_batches  # noqa: F401
from tests.data.test_preprocess import BYTES


def later(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


CHANGES = {
    "key": (lambda source: Recipe("ByteTokenizer", json_key="content"), "json_key was 'text', is 'content'"),
    "end": (lambda source: Recipe("ByteTokenizer", append_eod=False), "append_eod was True, is False"),
    "size": (lambda source: (source / "03.txt").write_text("!"), "input file 03.txt had 16 bytes, has 1"),
    "time": (lambda source: later(source / "03.txt"), "input file 03.txt was written since then"),
    "new": (lambda source: (source / "a.txt").write_text("!"), "input file a.txt is new"),
    "gone": (lambda source: (source / "19.txt").unlink(), "input file 19.txt is gone"),
    "more": (
        lambda source: [later(source / f"{number:02}.txt") for number in range(3)],
        "input file 00.txt was written since then, and so are 2 other files",
    ),
    "moved": (lambda source: source.rename(source.with_name("b")), r"input was '.*/folder', is '.*/b'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_job_is_refused_until_the_work_is_thrown_away(tmp_path: Path, change: str) -> None:
    source = corpus(tmp_path, "folder")
    shutil.rmtree(source / "sub")
    kill_at(3, source, tmp_path / "out")
    act, message = CHANGES[change]
    answer = act(source)
    recipe = answer if isinstance(answer, Recipe) else BYTES
    source = answer if isinstance(answer, Path) else source
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "out.partial").iterdir())
    with pytest.raises(ValueError, match=f"out.partial holds unfinished work on another job: {message}.*; --restart"):
        preprocess(source, tmp_path / "out", recipe, file_glob=EVERYTHING)
    after = sorted((path.name, path.read_bytes()) for path in (tmp_path / "out.partial").iterdir())
    assert before == after
    preprocess(source, tmp_path / "out", recipe, file_glob=EVERYTHING, restart=True)
    preprocess(source, tmp_path / "whole", recipe, file_glob=EVERYTHING)
    assert made(tmp_path / "out") == made(tmp_path / "whole")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    source = corpus(tmp_path, "x.jsonl")
    kill_at(3, source, tmp_path / "out")
    job = tmp_path / "out.partial" / "job.json"
    job.write_text(json.dumps(json.loads(job.read_text()) | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(
        ValueError, match=rf"another job: tokenizer_sha256 was '{'0' * 64}', is '[0-9a-f]{{64}}'; --res"
    ):
        preprocess(source, tmp_path / "out", BYTES, file_glob=EVERYTHING)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def with_state(folder: Path, **values: object) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | values))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda folder: cut(folder / "state.json", 20), r"state\.json: JSONDecodeError: Expecting"),
    "list": (lambda folder: (folder / "state.json").write_text("[]"), r"state\.json: TypeError: "),
    "empty": (lambda folder: (folder / "state.json").write_text("{}"), r"state\.json: KeyError: 'position'"),
    "unknown": (lambda folder: with_state(folder, more=1), "state.json: TypeError: .*'more'"),
    "negative": (lambda folder: with_state(folder, documents=-1), r"state\.json: ValueError: .*: required counts"),
    "text": (lambda folder: with_state(folder, tokens="1"), r"state\.json: ValueError: .*: required counts"),
    "flag": (lambda folder: with_state(folder, complete=1), r"state\.json: ValueError: .*: required counts"),
    "no job": (lambda folder: (folder / "job.json").unlink(), r"job\.json: FileNotFoundError: .*"),
    "job": (lambda folder: (folder / "job.json").write_text("{}"), r"job\.json: KeyError: 'files'"),
    "tokens": (lambda folder: cut(folder / "tokens", 10), r"tokens has 10 bytes: required at least \d+"),
    "lengths": (lambda folder: cut(folder / "lengths", 4), r"lengths has 4 bytes: required at least \d+"),
    "other lengths": (
        lambda folder: (folder / "lengths").write_bytes(np.full(100, 7, "<i4").tobytes()),
        r"lengths adds up to \d+ tokens: required \d+",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_work_is_refused_until_it_is_thrown_away(tmp_path: Path, damage: str) -> None:
    source = corpus(tmp_path, "x.jsonl")
    kill_at(3, source, tmp_path / "out")
    act, message = DAMAGES[damage]
    act(tmp_path / "out.partial")
    with pytest.raises(ValueError, match=rf"out\.partial is damaged: {message}.*; --restart throws"):
        preprocess(source, tmp_path / "out", BYTES, file_glob=EVERYTHING)
    preprocess(source, tmp_path / "out", BYTES, file_glob=EVERYTHING, restart=True)
    preprocess(source, tmp_path / "whole", BYTES)
    assert made(tmp_path / "out") == made(tmp_path / "whole")


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    source = corpus(tmp_path, "x.jsonl")
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(ValueError, match=r"out\.partial: process .* works on it: required one at a time") as error:
            preprocess(source, tmp_path / "out", BYTES, restart=True)
        refused.append(str(error.value))

    preprocess(source, tmp_path / "out", BYTES, on_progress=at_batch(2, second))
    assert len(refused) == 1 and f"process {os.getpid()} " in refused[0]
    preprocess(source, tmp_path / "whole", BYTES)
    assert made(tmp_path / "out") == made(tmp_path / "whole")


@pytest.mark.parametrize("name", ["mine.txt", "folder/mine.txt"])
def test_a_folder_of_that_name_that_is_somebody_elses_is_left_alone(tmp_path: Path, name: str) -> None:
    mine = tmp_path / "out.partial" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for restart in (False, True):
        with pytest.raises(ValueError, match=r"out\.partial holds (mine\.txt|folder), which is no"):
            preprocess(corpus(tmp_path, "x.jsonl"), tmp_path / "out", BYTES, restart=restart)
    assert mine.read_text() == "mine" and len(list((tmp_path / "out.partial").iterdir())) == 1


def test_something_else_of_that_name_is_refused_but_not_a_folder_that_is_gone_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = corpus(tmp_path, "x.jsonl")
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out\.partial"):
        preprocess(source, tmp_path / "out", BYTES)
    (tmp_path / "out.partial").unlink()
    mkdir, gone = Path.mkdir, [True]

    def removed_meanwhile(path: Path, *flags: object, **named: bool) -> None:
        if path.name == "out.partial" and gone:
            raise FileExistsError(gone.pop(), str(path))
        mkdir(path, *flags, **named)

    monkeypatch.setattr(Path, "mkdir", removed_meanwhile)
    assert preprocess(source, tmp_path / "out", BYTES).description.documents and not gone
