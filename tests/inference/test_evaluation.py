"""Every token is predicted once for any batch size, and the bytes of its text are counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_adalrs.data.indexed_dataset import IndexedDataset
from megatron_adalrs.data.indexed_dataset_builder import IndexedDatasetBuilder
from megatron_adalrs.data.tokenizer import ByteTokenizer
from megatron_adalrs.inference.evaluation import (
    IGNORE_INDEX,
    Evaluated,
    TextSize,
    evaluate,
    windows,
    windows_apart,
)
from tests.inference.test_decoder import VOCABULARY, model_of


@pytest.fixture
def indexed(tmp_path: Path) -> IndexedDataset:
    """Write documents of 30, 1, 40 and 25 tokens."""
    chance = np.random.default_rng(0)
    with IndexedDatasetBuilder(tmp_path / "data", np.uint16) as builder:
        for length in (30, 1, 40, 25):
            builder.add_document(chance.integers(0, VOCABULARY, length))
        builder.finalize()
    return IndexedDataset(tmp_path / "data")


def test_windows_predict_every_token_once(indexed: IndexedDataset) -> None:
    found = [window.tokens for window in windows(indexed, range(1, 3), 8)]
    stream = indexed.tokens(30, 41).astype(np.int64)
    assert [len(window) for window in found] == [9] * 5
    assert np.concatenate([window[1:] for window in found]).tolist() == stream[1:].tolist()
    assert [len(window.tokens) for window in windows(indexed, range(3, 4), 10)] == [11, 11, 5]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_loss_is_the_mean_over_tokens(indexed: IndexedDataset, batch_size: int) -> None:
    model = model_of("gpt2")
    found = evaluate(model, indexed, range(4), 10, batch_size)
    expected, tokens = 0.0, 0
    for window, predicted in windows(indexed, range(4), 10):
        expected += model(torch.from_numpy(window)[None]).item() * predicted
        tokens += predicted
    assert found.tokens == tokens == 95
    assert found.loss == pytest.approx(expected / tokens, rel=1e-6)
    assert found.perplexity == pytest.approx(np.exp(expected / tokens), rel=1e-5)


def test_it_stops_at_the_window_that_reaches_the_limit(indexed: IndexedDataset) -> None:
    told: list[int] = []
    found = evaluate(model_of("gpt2"), indexed, range(4), 10, 2, 35, on_progress=told.append)
    assert found.tokens == 40 and told == [20, 40]
    assert found.error > 0


def test_a_lone_token_is_refused(indexed: IndexedDataset) -> None:
    with pytest.raises(ValueError, match="fewer than 2 tokens"):
        evaluate(model_of("gpt2"), indexed, range(1, 2), 10, 2)


def test_documents_apart_start_with_eod(indexed: IndexedDataset) -> None:
    first, end = indexed.get_document(0), int(indexed.get_document(0)[-1])
    found = list(windows_apart(indexed, range(2), 20, end))
    assert [window.predicted for window in found] == [20, 9, 1]
    assert found[0].tokens.tolist() == [end, *first[:20].tolist()]
    assert found[1].tokens.tolist() == first[8:29].tolist(), "full, of which 9 are predicted"
    assert found[2].tokens.tolist() == [end, int(indexed.get_document(1)[0])]
    model, batch_sizes = model_of("gpt2"), (1, 8)
    expected = sum(
        cross_entropy(model.logits(tokens[None, :-1])[0, -count:], tokens[-count:], reduction="sum").item()
        for tokens, count in ((torch.from_numpy(window.tokens), window.predicted) for window in found)
    )
    for size in batch_sizes:
        apart = evaluate(model, indexed, range(2), 20, size, apart_after=end)
        assert (apart.tokens, apart.loss) == (30, pytest.approx(expected / 30, rel=1e-6))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 100])
def test_byte_count_does_not_depend_on_windows(length: int) -> None:
    tokenizer = ByteTokenizer()
    texts = ["日本🙂 naïve", "b", "ü" * 9]
    stream = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eod]]
    size = TextSize(tokenizer)
    for start in range(0, len(stream) - 1, length):
        size.add(stream[start], np.array(stream[start + 1 : start + 1 + length]))
    # The first byte is not predicted: what is left of that character shows as two replacements of three
    # bytes.
    assert size.total() == sum(len(text.encode()) for text in texts) - 3 + 2 * 3
    apart = TextSize(tokenizer, apart=True)
    for text in texts:
        apart.add(tokenizer.eod, np.array([IGNORE_INDEX, *tokenizer.encode(text)]))
    assert apart.total() == sum(len(text.encode()) for text in texts)


def test_text_without_eod_is_decoded_in_pieces() -> None:
    held = []

    class Watched(ByteTokenizer):
        def decode(self, ids: list[int]) -> str:
            held.append(len(ids))
            return super().decode(ids)

    size = TextSize(Watched())
    for _ in range(5):
        size.add(0, np.full(500_000, ord("a")))
    assert size.total() == sum(held) == 2_500_000 and max(held) < 1_500_000


def test_spelled_out_eod_counts_as_text() -> None:
    class Spelled(ByteTokenizer):
        """A tokenizer that encodes a spelled-out end-of-document token, like those of Hugging Face."""

        def decode(self, ids: list[int]) -> str:
            return "".join("<end>" if token == self.eod else chr(token) for token in ids)

    document = np.array([97, 256, 98])
    for apart, expected in ((True, 7), (False, 2)):
        size = TextSize(Spelled(), apart)
        size.add(256, document)
        assert size.total() == expected


def test_bits_per_byte_spread_the_loss_over_the_text() -> None:
    assert Evaluated(2 * np.log(2), 0.1, tokens=30, bytes=120).bits_per_byte == pytest.approx(0.5)
    assert Evaluated(1.0, 0.1, tokens=30, bytes=None).bits_per_byte is None
    assert Evaluated(1.0, 0.1, tokens=30, bytes=0).bits_per_byte is None, "ends of documents only"
