"""Preprocessing that is killed and goes on. What lies in PREFIX.partial at some instant is what a kill would
leave."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_adalrs.data.indexed_dataset import IndexedDataset
from megatron_adalrs.preprocessing import documents
from megatron_adalrs.preprocessing.partial import Progress
from megatron_adalrs.preprocessing.preprocess import preprocess
from tests.preprocessing.test_preprocess import BYTES, TEXTS, write_lines, zstd

KINDS = ("x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet", "one group.parquet", "folder")
MANY = [f"{text} {number}" if text else "" for number in range(4) for text in TEXTS]
EVERYTHING = "**/*"


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BATCH_BYTES", 100)


def corpus(folder: Path, kind: str) -> Path:
    if kind != "folder":
        return write_lines(folder / kind, MANY)
    (folder / kind / "sub").mkdir(parents=True)
    for number, text in enumerate(MANY):
        (folder / kind / f"{number:02}.txt").write_text(text)
    for name in KINDS[:-1]:
        write_lines(folder / kind / "sub" / name, MANY)
    return folder / kind


def made(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")]


def at_batch(number: int, act: Callable[[], None]) -> Callable[[int], None]:
    """For `on_progress`: acts once so many batches are done."""
    left = [number]

    def count(input_bytes: int) -> None:
        left[0] -= 1
        if not left[0]:
            act()

    return count


def kill_at(batch: int, source: Path, prefix: Path, *, behind: int = 0, workers: int = 1) -> None:
    """What a kill after so many batches leaves, the last of which, `behind`, came after the last commit."""
    partial, copy = Path(f"{prefix}.partial"), Path(f"{prefix}.copy")
    left = [0]

    def stop(input_bytes: int) -> None:
        left[0] += 1
        if left[0] == batch - behind:
            shutil.copy(partial / "state.json", f"{prefix}.state")
        if left[0] == batch:
            shutil.copytree(partial, copy)
            shutil.copy(f"{prefix}.state", copy / "state.json")
            raise Killed

    options = {"workers": workers, "commit_seconds": 0, "file_glob": EVERYTHING}
    with pytest.raises(Killed):
        preprocess(source, prefix, BYTES, on_progress=stop, **options)
    Path(f"{prefix}.state").unlink()
    shutil.rmtree(partial)
    copy.rename(partial)


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_resumes_to_the_same_bytes_after_any_batch(tmp_path: Path, kind: str, behind: int) -> None:
    source = corpus(tmp_path, kind)
    batches: list[int] = []
    preprocess(source, tmp_path / "whole", BYTES, file_glob=EVERYTHING, on_progress=batches.append)
    assert len(batches) > 3
    for batch in range(1 + behind, len(batches) + 1, 5 if kind == "folder" else 1):
        kill_at(batch, source, tmp_path / "out", behind=behind)
        resumed: list[Progress] = []
        progress: list[int] = []
        result = preprocess(
            source,
            tmp_path / "out",
            BYTES,
            file_glob=EVERYTHING,
            overwrite=True,
            on_resume=resumed.append,
            on_progress=progress.append,
        )
        assert made(tmp_path / "out") == made(tmp_path / "whole")
        assert [done.input_bytes for done in resumed] == [sum(batches[: batch - behind])] == progress[:1]
        assert sum(progress) == sum(batches)
        assert result.new_tokens == result.description.tokens - resumed[0].tokens
        assert result.skipped == MANY.count("") * (1 if kind != "folder" else len(KINDS))
        for suffix in ("bin", "idx", "json"):
            (tmp_path / f"out.{suffix}").unlink()
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_workers_may_go_on(tmp_path: Path, before: int, after: int) -> None:
    source = corpus(tmp_path, "folder")
    preprocess(source, tmp_path / "whole", BYTES, file_glob=EVERYTHING)
    kill_at(5, source, tmp_path / "out", workers=before)
    preprocess(source, tmp_path / "out", BYTES, file_glob=EVERYTHING, workers=after)
    assert made(tmp_path / "out") == made(tmp_path / "whole")


def test_an_interruption_keeps_all_that_is_done(tmp_path: Path) -> None:
    source = corpus(tmp_path, "x.jsonl")

    def interrupt() -> None:
        raise KeyboardInterrupt

    seen: list[Progress] = []
    with pytest.raises(KeyboardInterrupt):
        preprocess(source, tmp_path / "out", BYTES, on_progress=at_batch(3, interrupt), on_resume=seen.append)
    assert not seen and not (tmp_path / "out.bin").exists()
    preprocess(source, tmp_path / "out", BYTES, on_resume=seen.append)
    assert seen[0].position.content_bytes == seen[0].input_bytes > 0
    preprocess(source, tmp_path / "whole", BYTES)
    assert made(tmp_path / "out") == made(tmp_path / "whole")


def test_a_kill_before_the_first_commit_restarts(tmp_path: Path) -> None:
    source = corpus(tmp_path, "x.jsonl")
    (tmp_path / "out.partial").mkdir()
    for name in ("lock", "job.json", "tokens", "lengths"):
        (tmp_path / "out.partial" / name).write_bytes(b"1234")
    seen: list[Progress] = []
    preprocess(source, tmp_path / "out", BYTES, on_resume=seen.append)
    preprocess(source, tmp_path / "whole", BYTES)
    assert made(tmp_path / "out") == made(tmp_path / "whole")
    assert not seen


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["out.bin", "out.idx", "out.json"])
def test_killed_while_it_publishes_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, workers: int
) -> None:
    preprocess(write_lines(tmp_path / "old.jsonl", ["old"]), tmp_path / "out", BYTES)
    source = corpus(tmp_path, "x.jsonl")
    replace = os.replace

    def kill_before(old: Path, new: Path) -> None:
        if Path(new).name == name:
            raise Killed
        replace(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", kill_before)
        with pytest.raises(Killed):
            preprocess(source, tmp_path / "out", BYTES, overwrite=True)
    if name == "out.json":
        assert IndexedDataset(tmp_path / "out").num_documents == len(MANY) - MANY.count("")
    else:
        with pytest.raises(FileNotFoundError, match=r"out\.idx"):
            IndexedDataset(tmp_path / "out")
    result = preprocess(source, tmp_path / "out", BYTES, workers=workers)
    assert result.new_tokens == 0
    preprocess(source, tmp_path / "whole", BYTES)
    assert made(tmp_path / "out") == made(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_existing_output_beside_partial_is_refused(tmp_path: Path) -> None:
    source = corpus(tmp_path, "x.jsonl")
    kill_at(3, source, tmp_path / "out")
    (tmp_path / "out.idx").write_bytes(b"another's")
    for restart in (False, True):
        with pytest.raises(FileExistsError, match=r"out\.idx exists"):
            preprocess(source, tmp_path / "out", BYTES, restart=restart)
        assert (tmp_path / "out.partial" / "state.json").exists()


def test_output_created_in_the_meantime_is_refused(tmp_path: Path) -> None:
    source = corpus(tmp_path, "x.jsonl")
    preprocess(write_lines(tmp_path / "other.jsonl", ["other"]), tmp_path / "other", BYTES)

    def come() -> None:
        for suffix in ("bin", "idx", "json"):
            shutil.copy(tmp_path / f"other.{suffix}", tmp_path / f"out.{suffix}")

    # While it works, and after a kill between its last commit and the publishing.
    for act in (at_batch(3, come), lambda input_bytes: None):
        with pytest.raises(
            FileExistsError, match=r"out\.idx, .*exists: required a new prefix, or --overwrite"
        ):
            preprocess(source, tmp_path / "out", BYTES, on_progress=act)
        assert made(tmp_path / "out") == made(tmp_path / "other")
    assert preprocess(source, tmp_path / "out", BYTES, overwrite=True).new_tokens == 0
    preprocess(source, tmp_path / "whole", BYTES)
    assert made(tmp_path / "out") == made(tmp_path / "whole")


def test_unfinished_work_in_the_input_is_skipped(tmp_path: Path) -> None:
    source = corpus(tmp_path, "folder")
    preprocess(source, tmp_path / "whole", BYTES, file_glob=EVERYTHING)
    kill_at(3, source, source / "out")
    preprocess(source, source / "out", BYTES, file_glob=EVERYTHING)
    assert made(source / "out") == made(tmp_path / "whole")


def test_a_killed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    source = corpus(tmp_path, "x.jsonl")
    kill_at(3, source, tmp_path / "out")
    for name in (".state.json.0123456789ab.tmp", ".index.0123456789ab.tmp"):
        (tmp_path / "out.partial" / name).write_bytes(b"half")
    preprocess(source, tmp_path / "out", BYTES, file_glob=EVERYTHING)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 1) for kind in KINDS[:3]), (KINDS[0], 2)])
def test_bad_input_keeps_work_and_resumes_once_fixed(tmp_path: Path, kind: str, workers: int) -> None:
    source = tmp_path / kind
    pack = {".gz": gzip.compress, ".zst": zstd}.get(source.suffix, bytes)
    good = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in MANY)
    lines = good.splitlines(keepends=True)
    source.write_bytes(pack(b"".join([*lines[:15], b"broken\n", *lines[15:]])))
    seen: list[Progress] = []
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{kind}:16: malformed JSON"):
            preprocess(source, tmp_path / "out", BYTES, on_resume=seen.append, workers=workers)
    assert 0 < seen[0].position.lines <= 15
    source.write_bytes(pack(good + b'{"text": "one more"}\n'))
    preprocess(source, tmp_path / "out", BYTES, on_resume=seen.append, workers=workers)
    assert seen[0] == seen[1]
    preprocess(source, tmp_path / "whole", BYTES)
    assert made(tmp_path / "out") == made(tmp_path / "whole")


def test_unread_files_may_change_appear_and_vanish(tmp_path: Path) -> None:
    source = corpus(tmp_path, "folder")
    (source / "12.txt").write_bytes(b"\xff")
    seen: list[Progress] = []
    with pytest.raises(ValueError, match=r"12\.txt: not UTF-8"):
        preprocess(source, tmp_path / "out", BYTES, file_glob=EVERYTHING)
    (source / "12.txt").write_text("mended")
    (source / "11a.txt").write_text("new")
    (source / "13.txt").unlink()
    (source / "sub" / KINDS[0]).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: malformed JSON"):
        preprocess(source, tmp_path / "out", BYTES, file_glob=EVERYTHING, on_resume=seen.append)
    write_lines(source / "sub" / KINDS[0], ["mended"])
    preprocess(source, tmp_path / "out", BYTES, file_glob=EVERYTHING, on_resume=seen.append)
    assert 0 < seen[0].position.file <= 11 < seen[1].position.file
    preprocess(source, tmp_path / "whole", BYTES, file_glob=EVERYTHING)
    assert made(tmp_path / "out") == made(tmp_path / "whole")


def test_a_time_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="commit_seconds -1: required at least 0"):
        preprocess(corpus(tmp_path, "x.jsonl"), tmp_path / "out", BYTES, commit_seconds=-1)
