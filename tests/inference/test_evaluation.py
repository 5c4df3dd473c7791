"""Every token is predicted once, whatever the batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_adalrs.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron_adalrs.inference.evaluation import evaluate, windows
from tests.inference.test_decoder import VOCABULARY, model_of


@pytest.fixture
def indexed(tmp_path: Path) -> IndexedDataset:
    """Documents of 30, 1, 40 and 25 tokens."""
    chance = np.random.default_rng(0)
    with IndexedDatasetBuilder(tmp_path / "data", np.uint16) as builder:
        for length in (30, 1, 40, 25):
            builder.add_document(chance.integers(0, VOCABULARY, length))
        builder.finalize()
    return IndexedDataset(tmp_path / "data")


def test_windows_predict_every_token_but_the_first_once(indexed: IndexedDataset) -> None:
    found = list(windows(indexed, range(1, 3), 8))
    stream = indexed.tokens(30, 41).astype(np.int64)
    assert [len(window) for window in found] == [9] * 5
    assert np.concatenate([window[1:] for window in found]).tolist() == stream[1:].tolist()
    assert [len(window) for window in windows(indexed, range(3, 4), 10)] == [11, 11, 5]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_loss_is_the_mean_over_tokens(indexed: IndexedDataset, batch_size: int) -> None:
    model = model_of("gpt2")
    found = evaluate(model, indexed, range(4), 10, batch_size)
    expected, tokens = 0.0, 0
    for window in windows(indexed, range(4), 10):
        expected += model(torch.from_numpy(window)[None]).item() * (len(window) - 1)
        tokens += len(window) - 1
    assert found.tokens == tokens == 95
    assert found.loss == pytest.approx(expected / tokens, rel=1e-6)
    assert found.perplexity == pytest.approx(np.exp(expected / tokens), rel=1e-5)


def test_it_stops_at_the_window_that_reaches_the_limit(indexed: IndexedDataset) -> None:
    told: list[int] = []
    found = evaluate(model_of("gpt2"), indexed, range(4), 10, 2, 35, told.append)
    assert found.tokens == 40 and told == [20, 40]
    assert found.error > 0


def test_a_lone_token_is_refused(indexed: IndexedDataset) -> None:
    with pytest.raises(ValueError, match="fewer than 2 tokens"):
        evaluate(model_of("gpt2"), indexed, range(1, 2), 10, 2)
