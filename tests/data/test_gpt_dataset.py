from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_adalrs.data.gpt_dataset import (
    GPTDataset,
    build_gpt_datasets,
    check_vocabulary,
    parse_split,
    split_documents,
)
from megatron_adalrs.data.indexed_dataset import IndexedDataset
from megatron_adalrs.data.indexed_dataset_builder import IndexedDatasetBuilder

SEQ_LENGTH = 8


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """60 documents of 0 to 29 tokens; every token is its own position in the .bin."""
    rng = np.random.default_rng(0)
    lengths = [0, *rng.integers(1, 30, size=58).tolist(), 29]
    with IndexedDatasetBuilder(tmp_path / "corpus", np.int32) as builder:
        start = 0
        for length in lengths:
            builder.add_document(np.arange(start, start + length), [length // 2, length - length // 2])
            start += length
        builder.finalize()
    return tmp_path / "corpus"


def dataset(
    corpus: Path, num_samples: int = 50, seed: int = 7, documents: range = range(60), **rest
) -> GPTDataset:
    settings = {"split": "train", "seq_length": SEQ_LENGTH, "cache_dir": corpus.parent / "cache"} | rest
    return GPTDataset(IndexedDataset(corpus), documents, num_samples=num_samples, seed=seed, **settings)


def cache_files(corpus: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (corpus.parent / "cache").iterdir()}


def test_samples_are_int64_of_seq_length_plus_one(corpus: Path) -> None:
    samples = dataset(corpus)
    assert len(samples) == 50
    assert all(samples[i].shape == (SEQ_LENGTH + 1,) and samples[i].dtype == np.int64 for i in range(50))
    for outside in (-1, 50):
        with pytest.raises(
            IndexError, match=rf"sample {outside} of the train split: required 0 <= sample < 50"
        ):
            samples[outside]


def test_an_epoch_reads_every_token_in_document_order(corpus: Path) -> None:
    indexed = IndexedDataset(corpus)
    documents = range(10, 40)
    begin, end = indexed.document_offsets[[10, 40]].tolist()
    samples = dataset(corpus, -(-(end - begin) // SEQ_LENGTH), documents=documents)
    inputs = np.concatenate([samples[i][:-1] for i in range(len(samples))])
    assert set(inputs.tolist()) == set(range(begin, end))
    ends = set(indexed.document_offsets[11:41].tolist())
    for i in range(len(samples)):
        for token, following in zip(samples[i], samples[i][1:], strict=False):
            assert following == token + 1 or token + 1 in ends


def test_order_depends_on_seed_split_and_nothing_else(corpus: Path) -> None:
    def order(**changed) -> bytes:
        samples = dataset(corpus, **changed)
        return b"".join(samples[i].tobytes() for i in range(len(samples)))

    assert order() == order() == order(cache_dir=corpus.parent / "another")
    assert len({order(), order(seed=8), order(split="valid")}) == 3
    assert order(num_samples=400).startswith(order())


def test_order_digest(corpus: Path) -> None:
    digest = dataset(corpus).order_digest()
    assert len(digest) == 12
    assert int(digest, 16) >= 0
    assert dataset(corpus).order_digest() == digest
    assert dataset(corpus, 400).order_digest(first_n=50) == digest
    assert dataset(corpus, seed=8).order_digest() != digest
    assert dataset(corpus, seq_length=4).order_digest() != digest


def test_the_second_time_nothing_is_written(corpus: Path) -> None:
    dataset(corpus)
    written = cache_files(corpus)
    assert len(written) == 4
    dataset(corpus)
    assert cache_files(corpus) == written
    dataset(corpus, num_samples=51)
    assert len(cache_files(corpus)) == 8


def test_the_cache_describes_itself(corpus: Path) -> None:
    dataset(corpus)
    (record,) = (corpus.parent / "cache").glob("*.json")
    description = json.loads(record.read_text())["description"]
    assert description == {
        "order_version": 1,
        "dataset_sha256": IndexedDataset(corpus).digest,
        "documents": [0, 60],
        "split": "train",
        "seq_length": SEQ_LENGTH,
        "num_samples": 50,
        "seed": 7,
    }


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("part", ["documents.npy", "samples.npy", "shuffle.npy", ".json"])
def test_a_damaged_cache_is_rebuilt_with_a_warning(corpus: Path, damage, part: str, caplog) -> None:
    expected = [sample.tolist() for sample in map(dataset(corpus).__getitem__, range(50))]
    contents = {path: path.read_bytes() for path in (corpus.parent / "cache").iterdir()}
    (path,) = (corpus.parent / "cache").glob(f"*{part}")
    damage(path)
    with caplog.at_level(logging.WARNING):
        rebuilt = dataset(corpus)
    assert [rebuilt[i].tolist() for i in range(50)] == expected
    assert {path: path.read_bytes() for path in (corpus.parent / "cache").iterdir()} == contents
    gone_before_it_was_published = damage is Path.unlink and part == ".json"
    assert ("is damaged" in caplog.text) == (not gone_before_it_was_published)


def test_a_cache_of_something_else_is_not_used(corpus: Path, caplog) -> None:
    dataset(corpus)
    (record,) = (corpus.parent / "cache").glob("*.json")
    record.write_text(record.read_text().replace('"seed": 7', '"seed": 9'))
    dataset(corpus)
    assert "describes another index" in caplog.text
    assert '"seed": 7' in record.read_text()


def test_unwritable_cache_is_named(corpus: Path) -> None:
    blocked = corpus.parent / "corpus.bin" / "cache"
    with pytest.raises(OSError, match=r"index cache .*bin/cache cannot be written.*--data-cache-path"):
        dataset(corpus, cache_dir=blocked)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seq_length": 0}, "seq_length 0 of the train split: required at least 1"),
        ({"num_samples": 0}, "num_samples 0 of the train split: required at least 1"),
        ({"seed": -1}, "seed -1 of the train split: required at least 0"),
        ({"split": "dev"}, "split 'dev': required one of train, valid, test"),
        (
            {"documents": range(59, 60), "seq_length": 29},
            r"the train split of .*corpus has 29 tokens in 1 documents: "
            r"required at least seq_length\(29\) \+ 1 = 30",
        ),
    ],
)
def test_dataset_refuses(corpus: Path, changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(corpus, **changed)


def test_float_tokens_are_refused(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "x", np.float32) as builder:
        builder.add_document(np.zeros(20, np.float32))
        builder.finalize()
    with pytest.raises(ValueError, match=r"x\.bin has token type float32: required integers"):
        dataset(tmp_path / "x", documents=range(1))


@given(
    weights=st.tuples(*[st.one_of(st.just(0.0), st.floats(1e-3, 1e3))] * 3).filter(sum),
    documents=st.integers(0, 5000),
)
def test_splits_cover_all_documents_once_in_proportion(
    weights: tuple[float, float, float], documents: int
) -> None:
    parts = split_documents(weights, documents)
    assert [document for part in parts for document in part] == list(range(documents))
    for part, weight in zip(parts, weights, strict=True):
        assert abs(len(part) - weight / sum(weights) * documents) <= 1
        assert weight > 0 or not part


def test_split_by_hand() -> None:
    assert split_documents("969,30,1", 1000) == (range(969), range(969, 999), range(999, 1000))
    assert split_documents((1, 0, 1), 5) == (range(2), range(2, 2), range(2, 5))
    assert split_documents("100, 0, 0", 3) == (range(3), range(3, 3), range(3, 3))
    assert parse_split("969,30,1") == (969.0, 30.0, 1.0)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("9,1", "split '9,1' has 2 weights: required three"),
        ("9,1,1,1", "has 4 weights"),
        ("9,x,1", "split '9,x,1': required three numbers, like 969,30,1"),
        ("", "required three numbers"),
        ("9,-1,1", "split '9,-1,1': required weights that are finite and not negative"),
        ("9,nan,1", "finite"),
        ("inf,1,1", "finite"),
        ("0,0,0", "split '0,0,0': required at least one weight above zero"),
        ((0, 0, 0), r"split \(0, 0, 0\): required at least one weight above zero"),
    ],
)
def test_bad_splits_are_refused(split, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_documents(split, 100)


def test_build_gives_the_splits_that_are_asked_for(corpus: Path) -> None:
    train, valid, test = build_gpt_datasets(corpus, "8,2,0", SEQ_LENGTH, (30, 10, 5), seed=1)
    assert (len(train), len(valid), test) == (30, 10, None)
    assert train.documents == range(48)
    assert valid.documents == range(48, 60)
    boundary = IndexedDataset(corpus).document_offsets[48]
    assert max(train[i].max() for i in range(30)) < boundary <= min(valid[i].min() for i in range(10))
    assert build_gpt_datasets(corpus, "8,2,0", SEQ_LENGTH, (30, 0, 0), seed=1)[1] is None
    assert len(cache_files(corpus)) == 8


def test_a_split_too_small_is_refused_only_if_used(corpus: Path) -> None:
    build_gpt_datasets(corpus, "969,30,1", SEQ_LENGTH, (30, 10, 0), seed=1)
    with pytest.raises(
        ValueError, match=r"the test split of .* has 0 tokens in 0 documents: required at least"
    ):
        build_gpt_datasets(corpus, "969,30,1", SEQ_LENGTH, (30, 10, 1), seed=1)
    with pytest.raises(ValueError, match=r"num_samples \(1, 2\): required three numbers"):
        build_gpt_datasets(corpus, "969,30,1", SEQ_LENGTH, (1, 2), seed=1)
    with pytest.raises(ValueError, match=r"required three numbers that are not negative"):
        build_gpt_datasets(corpus, "969,30,1", SEQ_LENGTH, (1, -2, 0), seed=1)


def test_check_vocabulary(corpus: Path) -> None:
    tokens = IndexedDataset(corpus).num_tokens
    check_vocabulary(corpus, tokens)
    with pytest.raises(
        ValueError, match=rf"corpus\.bin holds token {tokens - 1}: required 0 to {tokens - 2}, the vocabulary"
    ):
        check_vocabulary(corpus, tokens - 1)


def test_check_vocabulary_negative_tokens_and_no_data(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "x", np.int32) as builder:
        builder.finalize()
    check_vocabulary(tmp_path / "x", 1)
    with IndexedDatasetBuilder(tmp_path / "x", np.int32) as builder:
        builder.add_document([1, -5])
        builder.finalize()
    with pytest.raises(ValueError, match="holds token -5"):
        check_vocabulary(tmp_path / "x", 100)


def test_check_vocabulary_samples_all_of_large_data(tmp_path: Path) -> None:
    tokens = np.zeros(10_500_000, dtype=np.uint8)
    tokens[-1] = 200
    with IndexedDatasetBuilder(tmp_path / "x", np.uint8) as builder:
        builder.add_document(tokens)
        builder.finalize()
    check_vocabulary(tmp_path / "x", 201)
    with pytest.raises(ValueError, match="holds token 200"):
        check_vocabulary(tmp_path / "x", 200)
