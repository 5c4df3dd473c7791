"""Texts that a tokenizer must give back, and what every tokenizer promises."""

from __future__ import annotations

import gzip
import inspect
import json
from pathlib import Path

import pytest

from megatron_adalrs.data.tokenizer import Tokenizer

TEXTS = {
    "code": inspect.getsource(gzip),
    "blanks": "  lead\n\n\n\ttab \t \r\n    if x:\r\n\t\treturn  1   \n        ",
    "markers": "<s>not a marker</s> <unk> <0x41> \x00 \x7f \ufeff",
    "scripts": "Ελληνικά, Кириллица, עברית, العربية, हिन्दी, ไทย, 中文, 日本語かなカナ, 한국어, ქართული, አማርኛ",
    "combining": "e\u0301 vs \u00e9, ﬁ ligature, ½, full-width ＡＢＣ, no-break\u00a0blank, \u2028",
    "emoji": "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇺🇳",
    "empty": "",
    "newline": "\n",
}


def write_corpus(folder: Path) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS.values()), encoding="utf-8")
    return path


def gpt2_files(folder: Path) -> Path:
    """The folder, with a vocab.json and a merges.txt of 500 tokens."""
    tokenizers = pytest.importorskip(
        "tokenizers", reason="the package tokenizers (extra hf) is not installed"
    )
    trainer = tokenizers.ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        TEXTS.values(), vocab_size=500, special_tokens=["<|endoftext|>"], min_frequency=2, show_progress=False
    )
    trainer.save_model(str(folder))
    return folder


def require_protocol(tokenizer: Tokenizer) -> None:
    for text in TEXTS.values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.vocab_size, *ids]) == text, "a model may have more tokens"
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        assert tokenizer.eod not in ids
    assert 0 <= tokenizer.eod < tokenizer.vocab_size
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("half a \ud83d pair")
