from __future__ import annotations

from pathlib import Path

import pytest

from megatron_adalrs.data.tokenizer import build_tokenizer
from megatron_adalrs.preprocessing.tokenizer_training import train_sentencepiece
from tests.preprocessing.texts import require_protocol, write_corpus


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic(tmp_path: Path, model_type: str) -> None:
    corpus = write_corpus(tmp_path)
    for name in ("a", "b"):
        train_sentencepiece([corpus], tmp_path / name, 500, model_type=model_type, sample_bytes=9000)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    require_protocol(build_tokenizer("SentencePieceTokenizer", tmp_path / "a"))


def test_the_sample_is_spread_over_all_inputs(tmp_path: Path) -> None:
    for name, word in (("a", "aardvark"), ("b", "buffalo"), ("c", "crocodile")):
        (tmp_path / f"{name}.txt").write_text(f"{word}\n" * 2000)
    train_sentencepiece([tmp_path], tmp_path / "x.model", 290, sample_bytes=5000)
    tokenizer = build_tokenizer("SentencePieceTokenizer", tmp_path / "x.model")
    assert [len(tokenizer.encode(word)) for word in ("aardvark", "buffalo", "crocodile")] < [8, 7, 9]
    assert all(len(tokenizer.encode(word)) <= 4 for word in ("aardvark", "buffalo", "crocodile"))


@pytest.mark.parametrize("vocab_size", [100, 10**6])
def test_impossible_vocabularies_are_refused(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(
        ValueError, match=f"vocab size {vocab_size}: SentencePiece cannot train it on this text"
    ):
        train_sentencepiece([write_corpus(tmp_path)], tmp_path / "x.model", vocab_size)
    assert not (tmp_path / "x.model").exists()
