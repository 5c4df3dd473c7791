from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_adalrs.data.description import Description, read_description
from megatron_adalrs.data.indexed_dataset import IndexedDataset
from megatron_adalrs.data.tokenizer import ByteTokenizer
from megatron_adalrs.preprocessing.documents import read_documents
from megatron_adalrs.preprocessing.preprocess import Recipe, preprocess

BYTES = Recipe("ByteTokenizer")
TEXTS = ["first", "", "zweites – mit Strich", "line\nbreak\ttab", "\u2028 😀"]


def write_lines(path: Path, texts: list[str], key: str = "text") -> Path:
    content = "".join(json.dumps({"id": 1, key: text}, ensure_ascii=False) + "\n" for text in texts).encode()
    if path.suffix == ".parquet":
        table = pyarrow.table({"id": [1] * len(texts), key: texts})
        pyarrow.parquet.write_table(table, path, row_group_size=len(texts) if path.stem == "one group" else 2)
    else:
        path.write_bytes({".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)(content))
    return path


def zstd(content: bytes) -> bytes:
    """In two frames, as tools that append write them."""
    frames = []
    for part in (content[:7], content[7:]):
        target = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(target, "zstd") as stream:
            stream.write(part)
        frames.append(target.getvalue().to_pybytes())
    return b"".join(frames)


def parquet(folder: Path, name: str = "x.parquet", **columns: list | pyarrow.Array) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / name, row_group_size=2)
    return folder / name


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.get_document(number).tolist() for number in range(dataset.num_documents)]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.json.zst", "x.parquet"])
@pytest.mark.parametrize("append_eod", [True, False])
def test_lines_become_documents(tmp_path: Path, name: str, append_eod: bool) -> None:
    source = write_lines(tmp_path / name, TEXTS, key="content")
    recipe = Recipe("ByteTokenizer", json_key="content", append_eod=append_eod)
    result = preprocess(source, tmp_path / "new" / "out", recipe)
    end = [256] if append_eod else []
    expected = [[*text.encode(), *end] for text in TEXTS if text]
    assert documents(tmp_path / "new" / "out") == expected
    assert result.skipped == 1
    assert result.description == Description(
        tokenizer_type="ByteTokenizer",
        tokenizer_sha256=ByteTokenizer().sha256,
        vocab_size=257,
        eod=256,
        append_eod=append_eod,
        dtype="uint16",
        documents=4,
        tokens=sum(map(len, expected)),
    )
    assert read_description(tmp_path / "new" / "out") == result.description


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    for name, text in (
        ("b.py", "two"),
        ("a/z.py", "one"),
        ("a/skipped.txt", "no"),
        ("b/a.py", "three"),
        ("e.py", ""),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    result = preprocess(folder, tmp_path / "out", BYTES, file_glob="**/*.py")
    assert [bytes(document[:-1]).decode() for document in documents(tmp_path / "out")] == [
        "one",
        "two",
        "three",
    ]
    assert result.skipped == 1


def test_files_of_a_folder_are_read_by_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    (folder / "sub").mkdir(parents=True)
    write_lines(folder / "a.parquet", ["p1", "p2", "p3"])
    write_lines(folder / "b.jsonl.zst", ["z1", "z2"])
    (folder / "c.txt").write_text("one\ntext")
    write_lines(folder / "sub" / "d.jsonl", ["j1"])
    seen: list[int] = []
    preprocess(folder, tmp_path / "out", BYTES, file_glob="**/*", on_progress=seen.append)
    expected = ["p1", "p2", "p3", "z1", "z2", "one\ntext", "j1"]
    assert documents(tmp_path / "out") == [[*text.encode(), 256] for text in expected]
    assert sum(seen) == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_damaged_row_group_is_refused(tmp_path: Path) -> None:
    source = parquet(tmp_path, text=["some text that is long enough to be stored by itself"] * 2 + ["b", "c"])
    content = bytearray(source.read_bytes())
    content[4:60] = bytes(56)
    source.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.parquet is not a complete Parquet file"):
        preprocess(source, tmp_path / "out", BYTES)


def test_output_does_not_depend_on_the_workers(tmp_path: Path) -> None:
    texts = [f"{number} " * (number % 700) for number in range(4000)]
    source = write_lines(tmp_path / "x.jsonl", texts)
    progress: dict[int, list[int]] = {1: [], 2: []}
    for workers in (1, 2):
        preprocess(
            source, tmp_path / f"out{workers}", BYTES, workers=workers, on_progress=progress[workers].append
        )
    for suffix in (".bin", ".idx", ".json"):
        one, two = (tmp_path / f"out{workers}{suffix}" for workers in (1, 2))
        assert one.read_bytes() == two.read_bytes()
    assert progress[1] == progress[2]
    assert len(progress[1]) > 3
    assert sum(progress[1]) == source.stat().st_size


def test_progress_over_an_archive_adds_up_to_its_size(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl.gz", TEXTS)
    progress: list[int] = []
    preprocess(source, tmp_path / "out", BYTES, on_progress=progress.append)
    assert sum(progress) == source.stat().st_size


def test_an_existing_output_is_replaced_only_on_demand(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", ["old"])
    preprocess(source, tmp_path / "out", BYTES)
    write_lines(source, ["new"])
    with pytest.raises(
        FileExistsError, match=r"out\.bin, .*out\.idx, .*out\.json exists: required .* --overwrite"
    ):
        preprocess(source, tmp_path / "out", BYTES)
    assert documents(tmp_path / "out") == [[*b"old", 256]]
    preprocess(source, tmp_path / "out", BYTES, overwrite=True)
    assert documents(tmp_path / "out") == [[*b"new", 256]]


def lines(content: bytes, name: str = "x.jsonl") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def folder_with(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "texts").mkdir()
        (folder / "texts" / name).write_bytes(content)
        return folder / "texts"

    return write


def test_an_output_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", TEXTS)
    (tmp_path / "out.bin").mkdir()
    batches: list[int] = []
    with pytest.raises(FileExistsError, match=r"output .*out\.bin is a folder: required a new prefix"):
        preprocess(source, tmp_path / "out", BYTES, overwrite=True, on_progress=batches.append)
    assert not batches and not (tmp_path / "out.partial").exists()


GOOD = b'{"text": "good"}\n'
BAD_INPUTS = {
    "missing": (
        lambda folder: folder / "none.jsonl",
        r"input .*none\.jsonl: there is no such file or folder",
    ),
    "kind": (
        lines(GOOD, "x.csv"),
        r"x\.csv: required a folder or a file named \*\.jsonl, \*\.json, \*\.jsonl\.gz",
    ),
    "empty": (lines(b""), r"input .*x\.jsonl is empty: required at least one document"),
    "blank": (lines(b"\n \n"), r"none of its 0 documents has any text"),
    "no text": (
        lines(b'{"text": ""}\n' * 3),
        r"none of its 3 documents has any text, at least one is required",
    ),
    "malformed": (lines(GOOD + b"\n{'text'}\n"), r"x\.jsonl:3: malformed JSON: Expecting property name"),
    "cut": (lines(GOOD + b'{"text": "go'), r"x\.jsonl:2: malformed JSON: Unterminated string"),
    "digits": (lines(b'{"text": ' + b"1" * 5000 + b"}"), r"x\.jsonl:1: (malformed JSON|key 'text' is int)"),
    "array": (lines(b'["text"]\n'), r"x\.jsonl:1: required a JSON object, found list"),
    "key": (
        lines(GOOD + b'{"txt": "a", "id": 1}\n'),
        r"x\.jsonl:2: there is no key 'text'; keys found: 'txt', 'id'",
    ),
    "no key": (lines(b"{}\n"), r"x\.jsonl:1: there is no key 'text'; keys found: none"),
    "value": (lines(GOOD + b'{"text": null}\n'), r"x\.jsonl:2: key 'text' is NoneType: required a string"),
    "encoding": (
        lines(GOOD + b'{"text": "\xe4"}\n'),
        r"x\.jsonl:2: not UTF-8: invalid continuation byte at byte 10",
    ),
    "surrogate": (lines(GOOD + rb'{"text": "ab\ud83d"}'), r"x\.jsonl:2: unpaired surrogate at character 2"),
    "archive": (
        lines(b"no archive", "x.jsonl.gz"),
        r"x\.jsonl\.gz is not a complete gzip file: Not a gzipped file",
    ),
    "cut archive": (
        lines(gzip.compress(GOOD)[:-6], "x.jsonl.gz"),
        r"x\.jsonl\.gz is not a complete gzip file",
    ),
    "zstd archive": (lines(b"no archive", "x.jsonl.zst"), r"x\.jsonl\.zst is not a complete zstd file"),
    "cut zstd archive": (
        lines(zstd(GOOD * 99)[:-6], "x.jsonl.zst"),
        r"x\.jsonl\.zst is not a complete zstd file: Trunc",
    ),
    "no Parquet": (lines(b"no Parquet", "x.parquet"), r"input .*x\.parquet is not a complete Parquet file"),
    "column": (
        lambda folder: parquet(folder, txt=["a"], id=[1]),
        r"x\.parquet: there is no column 'text'; columns found: 'txt', 'id'",
    ),
    "column's type": (
        lambda folder: parquet(folder, text=[1, 2]),
        r"x\.parquet: column 'text' is int64: required strings",
    ),
    "null": (
        lambda folder: parquet(folder, text=["a", None, "c", "d"]),
        r"x\.parquet:2: column 'text' is null: required a string",
    ),
    "rows' encoding": (
        lambda folder: parquet(folder, text=pyarrow.array([b"a", b"\xe4"]).view("string")),
        r"x\.parquet:2: not UTF-8: unexpected end of data at byte 0",
    ),
    "no match": (folder_with("a.md", b"text"), r"input .*texts: no file matches '\*\*/\*\.txt'"),
    "empty files": (folder_with("a.txt", b""), r"input .*texts is empty"),
    "file encoding": (
        folder_with("a.txt", b"ok \xff"),
        r"texts/a\.txt: not UTF-8: invalid start byte at byte 3",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused_and_nothing_is_touched(tmp_path: Path, case: str) -> None:
    make, message = BAD_INPUTS[case]
    (tmp_path / "out.bin").write_bytes(b"before")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        preprocess(make(tmp_path), tmp_path / "out", BYTES, overwrite=True)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.bin"]
    assert (tmp_path / "out.bin").read_bytes() == b"before"


def test_errors_of_workers_name_the_line_too(tmp_path: Path) -> None:
    source = lines(GOOD * 3 + b"{}\n")(tmp_path)
    with pytest.raises(ValueError, match=r"x\.jsonl:4: there is no key 'text'"):
        preprocess(source, tmp_path / "out", BYTES, workers=2)


def test_line_numbers_count_across_batches(tmp_path: Path) -> None:
    source = lines(b'{"text": "%s"}\n' % (b"x" * 1000) * 3000 + b"oops\n")(tmp_path)
    with pytest.raises(ValueError, match=r"x\.jsonl:3001: malformed JSON"):
        preprocess(source, tmp_path / "out", BYTES)


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    source = lines(GOOD)(tmp_path)
    with pytest.raises(ValueError, match="workers 0: required at least 1"):
        preprocess(source, tmp_path / "out", BYTES, workers=0)
    with pytest.raises(ValueError, match="tokenizer type 'Nobody'"):
        preprocess(source, tmp_path / "out", Recipe("Nobody"))
    with pytest.raises(ValueError, match="file glob '/x': required a relative pattern"):
        preprocess(tmp_path, tmp_path / "out", BYTES, file_glob="/x")


def test_a_sidecar_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    assert read_description(tmp_path / "x") is None
    for content in ("{", "[]", '{"tokens": 3}'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match=r"x\.json does not describe an indexed dataset"):
            read_description(tmp_path / "x")


def test_a_large_row_group_is_read_in_many_batches(tmp_path: Path) -> None:
    texts = [f"{number} " * (number % 90) for number in range(6000)] + [""] * 6000
    batches: list[int] = []
    for name, texts_of_type in (
        ("small", pyarrow.array(texts)),
        ("large", pyarrow.array(texts, "large_string")),
    ):
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"id": range(12000), "text": texts_of_type}), path)
        assert pyarrow.parquet.read_metadata(path).num_row_groups == 1
        batches.clear()
        result = preprocess(path, tmp_path / name, BYTES, on_progress=batches.append)
        assert len(batches) > 5 and sum(batches) == path.stat().st_size
        assert documents(tmp_path / name) == [[*text.encode(), 256] for text in texts if text]
        assert result.skipped == texts.count("")


BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(BOM + b'{"text": "one"}\n' + BOM + b'{"text": "two"}\n' + BOM)
    assert list(read_documents(tmp_path / "a.jsonl", "text", "")) == ["one", "two"]
    (tmp_path / "b.txt").write_bytes(BOM + "three\ufeff".encode())
    assert list(read_documents(tmp_path, "text", "**/*.txt")) == ["three\ufeff"]


def _broken_link(path: Path) -> None:
    path.symlink_to("nowhere.txt")


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_broken_link, r"b\.txt is a link to nowhere\.txt, which does not exist: remove it"),
        (_link_to_itself, r"b\.txt is a link to .*b\.txt, which does not exist"),
        (os.mkfifo, r"b\.txt is a device, pipe or socket: required a regular file"),
    ],
)
def test_what_is_no_file_in_a_folder_is_refused(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    folder = folder_with("a.txt", b"text")(tmp_path)
    make(folder / "b.txt")
    with pytest.raises(ValueError, match=message):
        preprocess(folder, tmp_path / "out", BYTES)
    assert list(read_documents(folder, "text", "a.*")) == ["text"], "only files that match count"


def test_a_folder_and_a_link_that_match_are_read(tmp_path: Path) -> None:
    folder = folder_with("a.txt", b"text")(tmp_path)
    (folder / "c.txt").mkdir()
    (folder / "b.txt").symlink_to("a.txt")
    assert list(read_documents(folder, "text", "**/*.txt")) == ["text", "text"]


def test_read_documents_gives_the_texts(tmp_path: Path) -> None:
    assert list(read_documents(write_lines(tmp_path / "x.jsonl", TEXTS), "text", "")) == TEXTS
