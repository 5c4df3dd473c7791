"""One tokenizer from the data to the checkpoint, another is refused wherever it comes in; where documents
end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.data.vocabulary import known_vocabulary, with_end_of_document
from megatron_adalrs.preprocessing.preprocess import Recipe, preprocess
from megatron_adalrs.preprocessing.tokenizer_training import train_sentencepiece
from tests.checkpoint.test_checkpoint import refusal, trained, values
from tests.helpers.ranks import Ranks


@pytest.fixture
def corpora(tmp_path: Path) -> tuple[Path, Path]:
    """Two SentencePiece tokenizers of the same size, and a corpus that each has made."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(
            json.dumps({"text": f"for {i} in range({i * i}): print({i})\n" * 4}) + "\n" for i in range(99)
        )
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
    assert (
        f"tokenizer_model: {two}.model (SHA-256 " in message and f"is not the tokenizer of {one}" in message
    )
    config = values(one, run, train_iters=2, **named, tokenizer_model=str(f"{one}.model"))
    assert one_rank.run(trained, config) == [0]
    told = "was trained with a different tokenizer (SHA-256 "
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


VALUES = {"preset": "gpt2-tiny", "seq_length": 8, "train_iters": 1, "lr": 1e-3}
NOTE = {
    "tokenizer_type": "ByteTokenizer",
    "vocab_size": 257,
    "eod": 256,
    "append_eod": True,
    "dtype": "uint16",
    "documents": 20,
    "tokens": 400,
    "tokenizer_sha256": "1" * 64,
}


def test_corpora_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    config = config_from_values(VALUES | {"data_path": [1, f"{tmp_path}/a", 1, f"{tmp_path}/b"]})
    (tmp_path / "b.json").write_text(json.dumps(NOTE))
    assert known_vocabulary(config).size == 257
    (tmp_path / "a.json").write_text(json.dumps(NOTE | {"tokenizer_sha256": "2" * 64}))
    with pytest.raises(
        ValueError, match=r"b.json names a different tokenizer \(ByteTokenizer, SHA-256 1{12}\) than"
    ):
        known_vocabulary(config)


def test_eod_from_flag_tokenizer_or_description(tmp_path: Path) -> None:
    def eod(**values: Any) -> int | None:
        values = {"data_path": f"{tmp_path}/a", "vocab_size": 300, "reset_attention_mask": True} | values
        config = config_from_values(VALUES | values)
        return with_end_of_document(config, known_vocabulary(config)).data.eod_token_id

    assert eod(eod_token_id=3) == 3
    assert eod(tokenizer_type="ByteTokenizer") == 256
    assert eod(reset_attention_mask=False) is None
    with pytest.raises(
        ValueError, match="reset_position_ids: the end-of-document token is unknown; give --eod-token"
    ):
        eod(reset_attention_mask=False, reset_position_ids=True)
    with pytest.raises(ValueError, match="eod_token_id: 300: required 0 to 299, the vocabulary of 300"):
        eod(eod_token_id=300)
    (tmp_path / "a.json").write_text(json.dumps(NOTE))
    assert eod() == 256
    with pytest.raises(ValueError, match=r"eod_token_id: 3 contradicts .*a.json, which says 256"):
        eod(eod_token_id=3)
    (tmp_path / "a.json").write_text(json.dumps(NOTE | {"append_eod": False}))
    with pytest.raises(
        ValueError, match=r"eod_mask_loss: .*a.json says that no document has an end-of-document"
    ):
        eod(reset_attention_mask=False, eod_mask_loss=True)
