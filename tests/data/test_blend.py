from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_adalrs.config import DataConfig
from megatron_adalrs.data.blend import Datasets, build_datasets
from megatron_adalrs.data.gpt_dataset import build_gpt_datasets
from megatron_adalrs.data.indexed_dataset_builder import IndexedDatasetBuilder

LENGTH = 8


def corpus(prefix: Path, token: int, documents: int, dtype: type = np.uint16) -> str:
    """Documents of 20 tokens: `token`, and their number in hundreds."""
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        for number in range(documents):
            builder.add_document(np.full(20, 100 * number + token))
        builder.finalize()
    return str(prefix)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for token, (name, documents) in enumerate({"a": 40, "b": 20, "c": 21}.items()):
        corpus(tmp_path / name, token, documents)
    return tmp_path


def built(folder: Path, samples: int = 60, **values: Any) -> Datasets:
    return build_datasets(DataConfig(**values), LENGTH, samples, 5, seed=3)


def read(dataset: Any, count: int) -> list[bytes]:
    return [dataset[number].tobytes() for number in range(count)]


def test_each_corpus_keeps_its_own_order(folder: Path) -> None:
    blend = built(folder, data_path=[2, f"{folder}/a", 1, f"{folder}/b"], split="1,0,0").train
    assert len(blend) == 60
    by_token: dict[int, list[bytes]] = {0: [], 1: []}
    for number in range(60):
        by_token[int(blend[number][0]) % 100].append(blend[number].tobytes())
    assert [len(samples) for samples in by_token.values()] == [40, 20]
    for name, samples in zip("ab", by_token.values(), strict=True):
        alone = build_gpt_datasets(folder / name, "1,0,0", LENGTH, (len(samples), 0, 0), seed=3)[0]
        assert read(alone, len(samples)) == samples
    for outside in (-1, 60):
        with pytest.raises(IndexError, match=f"sample {outside} of the blend: required 0 <= sample < 60"):
            blend[outside]


def test_a_single_corpus_keeps_order_and_digest(folder: Path) -> None:
    blend = built(folder, data_path=f"{folder}/a", split="8,1,1").train
    alone = build_gpt_datasets(folder / "a", "8,1,1", LENGTH, (60, 0, 0), seed=3)[0]
    assert read(blend, 60) == read(alone, 60)
    assert blend.order_digest(30) == alone.order_digest(30)
    assert blend.shares == {"a": "1"}


def test_digest_covers_corpora_and_shares_not_length(folder: Path) -> None:
    def digest(*entries: Any, samples: int = 60) -> str:
        return built(folder, samples, data_path=entries, split="1,0,0").train.order_digest(50)

    a, b, c = (f"{folder}/{name}" for name in "abc")
    digests = [
        digest(2, a, 1, b),
        digest(1, a, 2, b),
        digest(2, a, 1, c),
        digest(1, b, 2, a),
        digest(2, a, 1.01, b),
    ]
    assert len(set(digests)) == 5
    assert digest(4, a, 2, f"other={b}", samples=200) == digests[0]


def test_sizes_in_tokens_and_in_epochs(folder: Path) -> None:
    entries = [1, f"{folder}/a", 3, f"{folder}/b", 0, f"{folder}/c"]
    for sizes, shares in (
        ("weights", ["1/4", "3/4"]),
        ("tokens", ["1/4", "3/4"]),
        ("epochs", ["2/5", "3/5"]),
    ):
        blend = built(folder, data_path=entries, split="1,0,0", blend_sizes=sizes).train
        assert list(blend.shares.values()) == shares
    assert blend.used(250)[0].epochs == pytest.approx(1.0)  # 100 samples of 8 of the 800 tokens of a
    assert blend.used(250)[1].epochs == pytest.approx(3.0)


def test_what_was_passed_over_is_not_consumed(folder: Path) -> None:
    blend = built(folder, data_path=[1, f"{folder}/a", 1, f"{folder}/b"], split="1,0,0").train
    of_each = [[int(blend[n][0]) % 100 == token for n in range(60)] for token in (0, 1)]
    spans = ((3, 8), (20, 21), (30, 50))
    for here in (0, 5, 8, 25, 60):
        left = [n for n in range(here) if not any(first <= n < last for first, last in spans)]
        for use, belongs in zip(blend.used(here, spans), of_each, strict=True):
            assert use.samples == sum(belongs[n] for n in left)
            assert use.tokens == use.samples * LENGTH


def test_separate_corpora_are_used_whole(folder: Path) -> None:
    paths = {"train_data_path": f"{folder}/a", "valid_data_path": [f"{folder}/b", f"x={folder}/c"]}
    datasets = built(folder, **paths, test_data_path=[3, f"{folder}/b", 1, f"{folder}/c"])
    assert datasets.train.parts[0].dataset.num_tokens == 800
    assert [(part.name, float(part.share)) for part in datasets.valid] == [("b", 0.5), ("x", 0.5)]
    assert [(part.name, float(part.share)) for part in datasets.test] == [("b", 0.75), ("c", 0.25)]
    assert {part.dataset.num_tokens for part in (*datasets.valid, *datasets.test)} == {400, 420}
    assert [part.dataset.split for part in (datasets.valid[0], datasets.test[0])] == ["valid", "test"]
    assert built(folder, train_data_path=f"{folder}/a").valid == ()


def test_a_split_blend_is_evaluated_corpus_by_corpus(folder: Path) -> None:
    datasets = built(folder, data_path=[2, f"{folder}/a", 0, f"{folder}/b"], split="6,4,0")
    assert [part.name for part in datasets.train.parts] == ["a"]
    assert [(part.name, part.share) for part in datasets.valid] == [("a", 1), ("b", 0)]
    assert datasets.test == ()


def test_what_does_not_fit_together_is_refused(folder: Path) -> None:
    corpus(folder / "wide", 3, 20, np.int32)
    with pytest.raises(
        ValueError, match=r"wide.idx has token type int32, .*a.idx has uint16: required the same"
    ):
        built(folder, data_path=[1, f"{folder}/a", 1, f"{folder}/wide"])
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing.idx"):
        built(folder, train_data_path=f"{folder}/a", valid_data_path=f"{folder}/nothing")
    with pytest.raises(ValueError, match="split: '0,1,1' leaves nothing to train on"):
        built(folder, data_path=[1, f"{folder}/a", 1, f"{folder}/b"], split="0,1,1")
    with pytest.raises(ValueError, match="blend_sizes: epochs of corpora without tokens to train on"):
        built(folder, data_path=[1, f"{folder}/a", 1, f"{folder}/b"], split="0,1,1", blend_sizes="epochs")


@pytest.mark.parametrize(
    ("documents", "works"), [(8, "80,10,10"), (4, "50,25,25"), (2, "50,50,0"), (1, "1,0,0")]
)
def test_a_split_that_works_is_proposed(tmp_path: Path, documents: int, works: str) -> None:
    prefix = corpus(tmp_path / "few", 0, documents)
    with pytest.raises(ValueError, match=f"the valid split .* --split {works} works"):
        built(tmp_path, data_path=prefix)
    assert len(built(tmp_path, data_path=prefix, split=works).train) == 60
    assert len(build_datasets(DataConfig(data_path=prefix), LENGTH, 60, 0, seed=3).train) == 60


def test_a_corpus_below_a_sample_has_no_split(tmp_path: Path) -> None:
    prefix = corpus(tmp_path / "few", 0, 1)
    with pytest.raises(ValueError, match=r"the train split .* no --split leaves enough: give more data"):
        build_datasets(DataConfig(data_path=prefix), 20, 60, 5, seed=3)


@pytest.mark.parametrize(("samples", "field"), [((10**13, 5), "train_iters"), ((60, 10**13), "eval_iters")])
def test_more_samples_than_memory_are_refused(folder: Path, samples: tuple[int, int], field: str) -> None:
    arithmetic = rf"{field}: 10000000000000 samples .* x 24 bytes = 240 TB: this host has"
    with pytest.raises(ValueError, match=arithmetic):
        build_datasets(DataConfig(data_path=f"{folder}/a"), LENGTH, *samples, seed=3)
