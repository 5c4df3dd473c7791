"""Unfinished work that is another's, of another job, or damaged is refused and left as it is: see
test_partial.py."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_adalrs.preprocessing.preprocess import Recipe, preprocess
from tests.preprocessing.test_partial import EVERYTHING, at_batch, corpus, kill_at, made, small_batches  # noqa: F401
from tests.preprocessing.test_preprocess import BYTES, write_lines


def later(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


CHANGES = {
    "key": (lambda source: Recipe("ByteTokenizer", json_key="content"), "json_key was 'text', is 'content'"),
    "end": (lambda source: Recipe("ByteTokenizer", append_eod=False), "append_eod was True, is False"),
    "size": (lambda source: (source / "03.txt").write_text("!"), "input file 03.txt had 16 bytes, has 1"),
    "time": (lambda source: later(source / "03.txt"), "input file 03.txt was written since then"),
    "new": (lambda source: (source / "0.txt").write_text("!"), "input file 0.txt is new"),
    "gone": (lambda source: (source / "04.txt").unlink(), "input file 04.txt is gone"),
    "more": (
        lambda source: [later(source / f"{number:02}.txt") for number in range(3)],
        "input file 00.txt was written since then, and so are 2 other files",
    ),
    "moved": (lambda source: source.rename(source.with_name("b")), r"input was '.*/folder', is '.*/b'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_job_is_refused_unless_discarded(tmp_path: Path, change: str) -> None:
    source = corpus(tmp_path, "folder")
    shutil.rmtree(source / "sub")
    kill_at(3, source, tmp_path / "out")
    act, message = CHANGES[change]
    answer = act(source)
    recipe = answer if isinstance(answer, Recipe) else BYTES
    source = answer if isinstance(answer, Path) else source
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "out.partial").iterdir())
    with pytest.raises(
        ValueError, match=f"out.partial contains unfinished work of another job: {message}.*; --restart"
    ):
        preprocess(source, tmp_path / "out", recipe, file_glob=EVERYTHING)
    after = sorted((path.name, path.read_bytes()) for path in (tmp_path / "out.partial").iterdir())
    assert before == after
    preprocess(source, tmp_path / "out", recipe, file_glob=EVERYTHING, restart=True)
    preprocess(source, tmp_path / "whole", recipe, file_glob=EVERYTHING)
    assert made(tmp_path / "out") == made(tmp_path / "whole")


def lines_of(source: Path) -> list[bytes]:
    content = source.read_bytes()
    return (gzip.decompress(content) if source.suffix == ".gz" else content).splitlines(keepends=True)


def with_lines(source: Path, lines: list[bytes]) -> None:
    source.write_bytes((gzip.compress if source.suffix == ".gz" else bytes)(b"".join(lines)))


CHANGES_OF_A_FILE: dict[str, tuple[Callable[[Path, list[bytes]], object], str]] = {
    "line": (
        lambda source, lines: with_lines(source, [lines[0].replace(b"first", b"other"), *lines[1:]]),
        "",
    ),
    "fewer": (lambda source, lines: with_lines(source, lines[:2]), ""),
    "grown": (lambda source, lines: with_lines(source, [b" ", *lines]), ""),
    "gone": (lambda source, lines: source.unlink(), r"is gone; --restart"),
}


@pytest.mark.parametrize("kind", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("change", CHANGES_OF_A_FILE)
def test_what_is_done_of_a_file_must_be_as_it_was(tmp_path: Path, kind: str, change: str) -> None:
    (tmp_path / "folder").mkdir()
    source = corpus(tmp_path / "folder", kind)
    write_lines(tmp_path / "folder" / "b.jsonl", ["more"])
    kill_at(2, source.parent, tmp_path / "out")
    done = json.loads((tmp_path / "out.partial" / "state.json").read_text())["position"]["lines"]
    act, message = CHANGES_OF_A_FILE[change]
    act(source, lines_of(source))
    message = message or rf".*, and not only behind what is done, its first {done} lines or rows; --restart"
    with pytest.raises(ValueError, match=rf"another job: input file {re.escape(kind)} {message}"):
        preprocess(source.parent, tmp_path / "out", BYTES, file_glob=EVERYTHING)


def test_a_grown_unterminated_line_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_bytes(b'{"text": "one"}\n{"text": "two"}')
    kill_at(1, source, tmp_path / "out")
    later(source)
    preprocess(source, tmp_path / "whole", BYTES)
    shutil.copytree(tmp_path / "out.partial", tmp_path / "more.partial")
    preprocess(source, tmp_path / "out", BYTES)
    assert made(tmp_path / "out") == made(tmp_path / "whole")
    with source.open("ab") as stream:
        stream.write(b' \n{"text": "three"}\n')
    with pytest.raises(ValueError, match="not only behind what is done, its first 2 lines or rows"):
        preprocess(source, tmp_path / "more", BYTES)


def test_a_partly_read_parquet_file_must_be_unchanged(tmp_path: Path) -> None:
    source = corpus(tmp_path, "x.parquet")
    kill_at(2, source, tmp_path / "out")
    later(source)
    with pytest.raises(
        ValueError, match=r"x\.parquet was written since then, and not only .* first \d+ lines or rows"
    ):
        preprocess(source, tmp_path / "out", BYTES, file_glob=EVERYTHING)


def test_once_all_is_done_all_must_be_as_it_was(tmp_path: Path) -> None:
    source = corpus(tmp_path, "folder")
    with pytest.raises(FileExistsError):
        preprocess(
            source,
            tmp_path / "out",
            BYTES,
            on_progress=lambda count: (tmp_path / "out.idx").write_bytes(b"another's"),
        )
    write_lines(source / "zz.txt", ["more"])
    with pytest.raises(ValueError, match=r"input file zz\.txt is new; --restart"):
        preprocess(source, tmp_path / "out", BYTES, overwrite=True)


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
    "negative": (
        lambda folder: with_state(folder, documents=-1),
        r"state\.json: ValueError: .*: required counts",
    ),
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
def test_damaged_work_is_refused_unless_discarded(tmp_path: Path, damage: str) -> None:
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
        with pytest.raises(
            ValueError, match=r"out\.partial: process .* is using it: required one at a time"
        ) as error:
            preprocess(source, tmp_path / "out", BYTES, restart=True)
        refused.append(str(error.value))

    preprocess(source, tmp_path / "out", BYTES, on_progress=at_batch(2, second))
    assert len(refused) == 1 and f"process {os.getpid()} " in refused[0]
    preprocess(source, tmp_path / "whole", BYTES)
    assert made(tmp_path / "out") == made(tmp_path / "whole")


@pytest.mark.parametrize("name", ["mine.txt", "folder/mine.txt"])
def test_a_foreign_folder_of_that_name_is_left_alone(tmp_path: Path, name: str) -> None:
    mine = tmp_path / "out.partial" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for restart in (False, True):
        with pytest.raises(ValueError, match=r"out\.partial contains (mine\.txt|folder), which is not"):
            preprocess(corpus(tmp_path, "x.jsonl"), tmp_path / "out", BYTES, restart=restart)
    assert mine.read_text() == "mine" and len(list((tmp_path / "out.partial").iterdir())) == 1


def test_a_foreign_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
