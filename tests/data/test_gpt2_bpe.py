"""GPT-2's vocab.json and merges.txt: the ids of transformers for any text."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Tokenizer

from megatron_adalrs.data.tokenizer import Tokenizer, build_tokenizer
from tests.preprocessing.texts import TEXTS, gpt2_files, require_protocol

KIND = "GPT2BPETokenizer"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpt2_files(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def theirs(files: Path) -> GPT2Tokenizer:
    return GPT2Tokenizer.from_pretrained(files)


def ours(folder: Path) -> Tokenizer:
    return build_tokenizer(KIND, vocab_file=folder / "vocab.json", merge_file=folder / "merges.txt")


def test_it_is_a_tokenizer(files: Path) -> None:
    tokenizer = ours(files)
    require_protocol(tokenizer)
    vocabulary = json.loads((files / "vocab.json").read_text())
    assert (tokenizer.vocab_size, tokenizer.eod) == (500, vocabulary["<|endoftext|>"])
    both = [hashlib.sha256((files / name).read_bytes()).digest() for name in ("vocab.json", "merges.txt")]
    assert tokenizer.sha256 == hashlib.sha256(b"".join(both)).hexdigest()


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab 12'\n\tst.,<|>endoftext"))
def test_any_text_has_the_ids_of_transformers(files: Path, theirs: GPT2Tokenizer, text: str) -> None:
    tokenizer = ours(files)
    assert tokenizer.encode(text) == theirs(text)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_texts_have_the_ids_of_transformers(files: Path, theirs: GPT2Tokenizer) -> None:
    for text in (*TEXTS.values(), "one<|endoftext|>two"):
        assert ours(files).encode(text) == theirs(text)["input_ids"]


def test_what_is_wrong_is_named(files: Path, tmp_path: Path) -> None:
    vocab, merges = (shutil.copy(files / name, tmp_path) for name in ("vocab.json", "merges.txt"))
    for paths, message in [
        ((None, vocab, None), "merge_file: required for GPT2BPETokenizer"),
        ((None, None, merges), "vocab_file: required for GPT2BPETokenizer"),
        (
            (vocab, vocab, merges),
            "tokenizer model .*vocab.json: GPT2BPETokenizer takes vocab_file and merge_file",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            build_tokenizer(KIND, *paths)
    with pytest.raises(ValueError, match=r"vocab_file .*vocab\.json: ByteTokenizer takes none"):
        build_tokenizer("ByteTokenizer", None, vocab)
    with pytest.raises(
        ValueError, match=r"merge_file .*merges\.txt: HuggingFaceTokenizer takes tokenizer model"
    ):
        build_tokenizer("HuggingFaceTokenizer", vocab, None, merges)
    with pytest.raises(FileNotFoundError, match=r"tokenizer file .*none\.txt: there is no such file"):
        build_tokenizer(KIND, None, vocab, tmp_path / "none.txt")
    whole = json.loads(Path(vocab).read_text())
    some = {name: token for name, token in whole.items() if name not in "ab"}
    for content, message in [
        ("{", r"vocab\.json is not a JSON object"),
        ("[]", r"vocab\.json is not a JSON object: \[\]"),
        (
            json.dumps(whole | {"a": "b"}),
            r"vocab\.json is not a vocabulary: required an id, 0 or more, of each token",
        ),
        (
            json.dumps(some),
            r"lacks 2 of <\|endoftext\|> and the 256 bytes, ",
        ),
    ]:
        Path(vocab).write_text(content)
        with pytest.raises(ValueError, match=message):
            ours(tmp_path)
    shutil.copy(files / "vocab.json", tmp_path)
    Path(merges).write_text("#version: 0.2\nnot one\n")
    with pytest.raises(ValueError, match=r"merges\.txt does not hold merges of .*vocab\.json"):
        ours(tmp_path)
