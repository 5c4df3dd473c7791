"""One tokenizer from the data to the checkpoint: another one is refused, wherever it comes in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_adalrs.data.preprocess import Recipe, preprocess
from megatron_adalrs.data.tokenizer import train_sentencepiece
from tests.checkpoint.test_checkpoint import refusal, trained, values
from tests.distributed.ranks import Ranks


@pytest.fixture
def corpora(tmp_path: Path) -> tuple[Path, Path]:
    """Two SentencePiece tokenizers of the same size, and a corpus that each has made."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"for {i} in range({i * i}): print({i})\n" * 4}) + "\n" for i in range(99))
    )
    for name, kind in (("one", "bpe"), ("two", "unigram")):
        train_sentencepiece([texts], tmp_path / f"{name}.model", 300, model_type=kind)
        preprocess(texts, tmp_path / name, Recipe("SentencePieceTokenizer", tmp_path / f"{name}.model"))
    return tmp_path / "one", tmp_path / "two"


def test_another_tokenizer_is_refused(one_rank: Ranks, tmp_path: Path, corpora: tuple[Path, Path]) -> None:
    one, two = corpora
    run = tmp_path / "run"
    named = {"tokenizer_type": "SentencePieceTokenizer", "vocab_size": 300}

    def refused(data: Path, **changes: object) -> str:
        (message,) = one_rank.run(refusal, values(data, tmp_path / "other", **{"vocab_size": 300} | changes))
        assert "\n" not in message
        return message

    message = refused(one, **named, tokenizer_model=str(f"{two}.model"))
    assert f"tokenizer_model: {two}.model (SHA-256 " in message and f"is not what made {one}" in message
    config = values(one, run, train_iters=2, **named, tokenizer_model=str(f"{one}.model"))
    assert one_rank.run(trained, config) == [0]
    told = "was trained on tokens of another tokenizer (SHA-256 "
    assert told in refused(two, load=str(run), train_iters=2)
    assert told in refused(two, finetune_from=str(run))
    assert not (tmp_path / "other" / "metrics.jsonl").exists()
    assert one_rank.run(
        trained, values(one, tmp_path / "next", train_iters=2, vocab_size=300, finetune_from=str(run))
    ) == [0]
    # Where the data does not tell, nothing is known to differ.
    Path(f"{two}.json").unlink()
    assert one_rank.run(
        trained, values(two, tmp_path / "last", train_iters=2, vocab_size=300, finetune_from=str(run))
    ) == [0]
