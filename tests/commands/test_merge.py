"""Parts of a corpus, tokenized by themselves, become what the whole would have been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_adalrs.data.description import read_description
from megatron_adalrs.data.indexed_dataset_builder import IndexedDatasetBuilder
from megatron_adalrs.preprocessing.preprocess import Recipe, preprocess
from tests.helpers.programs import Done, called
from tests.preprocessing.test_preprocess import BYTES, TEXTS, documents, write_lines


@pytest.fixture
def merge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    return called("merge", monkeypatch, capsys)


def test_merged_parts_are_the_whole_to_the_byte(tmp_path: Path, merge: Callable[..., Done]) -> None:
    for name, texts in (("a", TEXTS[:3]), ("b", TEXTS[3:4]), ("c", TEXTS[4:]), ("whole", TEXTS)):
        preprocess(write_lines(tmp_path / f"{name}.jsonl", texts), tmp_path / name, BYTES)
    done = merge("--input", *(tmp_path / name for name in "abc"), "--output-prefix", tmp_path / "new" / "all")
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout
        == f"{tmp_path}/new/all: 4 documents, {sum(len(t.encode()) + 1 for t in TEXTS if t)} tokens of "
        f"uint16\n"
    )
    for suffix in (".bin", ".idx", ".json"):
        assert (
            Path(f"{tmp_path}/new/all{suffix}").read_bytes() == Path(f"{tmp_path}/whole{suffix}").read_bytes()
        )


def test_an_input_without_description(tmp_path: Path, merge: Callable[..., Done]) -> None:
    preprocess(write_lines(tmp_path / "a.jsonl", ["one"]), tmp_path / "a", BYTES)
    with IndexedDatasetBuilder(tmp_path / "b", np.uint16) as builder:
        builder.add_document([1, 2, 3])
        builder.finalize()
    done = merge("--input", tmp_path / "b", tmp_path / "a", "--output-prefix", tmp_path / "all")
    assert "no PREFIX.json is written, because an input has none" in done.stdout
    assert read_description(tmp_path / "all") is None
    assert documents(tmp_path / "all") == [[1, 2, 3], [*b"one", 256]]


def test_what_cannot_be_merged_is_one_sentence(tmp_path: Path, merge: Callable[..., Done]) -> None:
    a, b, c, d = (tmp_path / name for name in "abcd")
    preprocess(write_lines(tmp_path / "a.jsonl", ["one"]), a, BYTES)
    preprocess(write_lines(tmp_path / "b.jsonl", ["two"]), b, BYTES)
    preprocess(write_lines(tmp_path / "c.jsonl", ["two"]), c, Recipe("ByteTokenizer", append_eod=False))
    with IndexedDatasetBuilder(d, np.int32) as builder:
        builder.add_document([1])
        builder.finalize()
    for inputs, output, message in [
        ((a,), "all", "input: 1 datasets: required at least two"),
        ((a, b), "b", f"output_prefix: {b} is one of the inputs"),
        ((a, b), "c", f"output {c}.bin, {c}.idx, {c}.json exists: required a new prefix, or --overwrite"),
        ((a, c), "all", f"{c}.json has append_eod False, {a}.json has True: required the same"),
        ((a, d), "all", f"{d}.idx has token type int32: required uint16"),
        ((a, tmp_path / "none"), "all", "none.idx"),
    ]:
        done = merge("--input", *inputs, "--output-prefix", tmp_path / output)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert message in done.stderr
    assert sorted(path.name for path in tmp_path.glob("all*")) == []
    assert merge("--input", a, b, "--output-prefix", c, "--overwrite").returncode == 0
    assert documents(c) == [[*b"one", 256], [*b"two", 256]]
