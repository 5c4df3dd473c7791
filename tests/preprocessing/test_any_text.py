"""Tokenizers of every kind give back any text, also in scripts that none of them has seen in training."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adalrs.data.tokenizer import TOKENIZER_KINDS, Tokenizer, build_tokenizer
from megatron_adalrs.preprocessing.tokenizer_training import train_sentencepiece
from tests.preprocessing.texts import TEXTS, require_protocol

NAMES = ("bytes", "bpe", "unigram", "gpt2", "hugging face")
SEEN = TEXTS["code"]  # English and Python: the rest of the world must be bytes


@pytest.fixture(scope="module")
def tokenizers_of_all_kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    package = pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "seen.txt").write_text(SEEN)
    for kind in ("bpe", "unigram"):
        train_sentencepiece([folder], folder / f"{kind}.model", 500, model_type=kind)
    trainer = package.ByteLevelBPETokenizer()
    trainer.train_from_iterator([SEEN], 500, special_tokens=["<|endoftext|>"], show_progress=False)
    trainer.save_model(str(folder))
    trainer.save(str(folder / "tokenizer.json"))
    return {
        "bytes": build_tokenizer("ByteTokenizer"),
        "bpe": build_tokenizer("SentencePieceTokenizer", folder / "bpe.model"),
        "unigram": build_tokenizer("SentencePieceTokenizer", folder / "unigram.model"),
        "gpt2": build_tokenizer("GPT2BPETokenizer", None, folder / "vocab.json", folder / "merges.txt"),
        "hugging face": build_tokenizer("HuggingFaceTokenizer", folder / "tokenizer.json"),
    }


def test_the_texts_are_in_ten_scripts_and_more(tokenizers_of_all_kinds: dict[str, Tokenizer]) -> None:
    scripts = {unicodedata.name(letter).split()[0] for letter in "".join(TEXTS.values()) if letter.isalpha()}
    assert scripts >= {
        "LATIN",
        "GREEK",
        "CYRILLIC",
        "HEBREW",
        "ARABIC",
        "DEVANAGARI",
        "THAI",
        "CJK",
        "HIRAGANA",
        "KATAKANA",
        "HANGUL",
        "GEORGIAN",
        "ETHIOPIC",
    }
    assert "\u200d" in TEXTS["emoji"], "joined by something that is not seen"
    assert "\n\n" in TEXTS["blanks"] and "\t\t" in TEXTS["blanks"] and "    " in TEXTS["code"]
    assert {type(tokenizer).__name__ for tokenizer in tokenizers_of_all_kinds.values()} == {*TOKENIZER_KINDS}


@pytest.mark.parametrize("name", NAMES)
def test_every_script_comes_back(tokenizers_of_all_kinds: dict[str, Tokenizer], name: str) -> None:
    require_protocol(tokenizers_of_all_kinds[name])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200, deadline=None)
@given(
    # U+2581 is SentencePiece's own sign for a blank.
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))
    | st.text(st.sampled_from(sorted({*"".join(TEXTS.values())})), max_size=60)
    | st.lists(st.sampled_from([*TEXTS.values(), "\r\n", "\t", "  "]), max_size=4).map("".join)
)
def test_any_text_comes_back(tokenizers_of_all_kinds: dict[str, Tokenizer], name: str, text: str) -> None:
    tokenizer = tokenizers_of_all_kinds[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text
