"""AutoTokenizer of transformers gives the ids of our tokenizers for any text."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from megatron_adalrs.data.tokenizer import Tokenizer, build_tokenizer
from megatron_adalrs.huggingface.companion_files import find_companion_files
from megatron_adalrs.huggingface.tokenizer_export import export_tokenizer
from megatron_adalrs.preprocessing.tokenizer_training import train_sentencepiece
from tests.preprocessing.texts import TEXTS, require_protocol, write_corpus

CONFIGS = (GPT2Config, LlamaConfig, Qwen2Config)
KINDS = ("bytes", "bpe", "unigram")
POSITIONS = 4096
ANY_CHARACTER = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\U0010ffff")
# Pieces and the names of special ones meet more often than in texts of any characters.
ANY_TEXT = st.one_of(st.text(ANY_CHARACTER), st.text(st.sampled_from("ab <>/s\n\t(=,.)ertx0414unk")))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | None]:
    folder = tmp_path_factory.mktemp("models")
    for kind in ("bpe", "unigram"):
        train_sentencepiece([write_corpus(folder)], folder / f"{kind}.model", 600, model_type=kind)
    return {"bytes": None, "bpe": folder / "bpe.model", "unigram": folder / "unigram.model"}


def made(model: Path | None, model_type: str = "gpt2") -> tuple[Tokenizer, Mapping[str, bytes], str]:
    """Return a tokenizer of ours, its exported files, and the note."""
    kind = "SentencePieceTokenizer" if model else "ByteTokenizer"
    files, told = export_tokenizer(kind, {"tokenizer.model": model} if model else {}, model_type, POSITIONS)
    return build_tokenizer(kind, model), files, told


@pytest.fixture(scope="module")
def backends(models: Mapping[str, Path | None]) -> dict[str, tuple[Tokenizer, Backend]]:
    found = {}
    for kind, model in models.items():
        ours, files, _ = made(model)
        backend = Backend.from_buffer(files["tokenizer.json"])
        backend.encode_special_tokens = True
        found[kind] = ours, backend
    return found


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("kind", KINDS)
def test_auto_tokenizer_gives_our_ids(
    models: Mapping[str, Path | None], tmp_path: Path, kind: str, config: type[PretrainedConfig]
) -> None:
    ours, files, _ = made(models[kind], config.model_type)
    config(vocab_size=600, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), build_tokenizer("HuggingFaceTokenizer", tmp_path)
    for text in TEXTS.values():
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == again.encode(text) == ids
        assert theirs.decode(ids) == again.decode(ids) == text
    assert (theirs.eos_token_id, again.eod) == (ours.eod, ours.eod)
    assert len(theirs) == again.vocab_size == ours.vocab_size
    assert theirs.model_max_length == POSITIONS
    assert theirs.bos_token is None, "lm-eval would begin with a token that training has never seen"
    require_protocol(again)
    theirs.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(TEXTS["markers"])["input_ids"] == ours.encode(
        TEXTS["markers"]
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_has_the_same_ids(
    models: Mapping[str, Path | None], backends: Mapping[str, tuple[Tokenizer, Backend]], kind: str, text: str
) -> None:
    ours, backend = backends[kind]
    expected, found = ours.encode(text), backend.encode(text, add_special_tokens=False).ids
    if kind == "unigram" and found != expected:
        # As likely, but for rounding: see `backend_of`.
        score = SentencePieceProcessor(model_file=str(models[kind])).get_score
        assert sum(map(score, found)) == pytest.approx(sum(map(score, expected)), rel=1e-5)
    else:
        assert found == expected
    assert backend.decode(found, skip_special_tokens=False) == ours.decode(expected) == text


def trained(path: Path, **settings: object) -> Path:
    usual = {
        "model_type": "bpe",
        "vocab_size": 400,
        "hard_vocab_limit": False,
        "normalization_rule_name": "identity",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
    }
    with path.open("wb") as stream:
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS["code"].split("\n")),
            model_writer=stream,
            minloglevel=2,
            **usual | settings,
        )
    return path


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_model_that_begins_texts_with_a_blank(tmp_path: Path, kind: str) -> None:
    ours, files, _ = made(trained(tmp_path / "x.model", add_dummy_prefix=True, model_type=kind))
    backend = Backend.from_buffer(files["tokenizer.json"])
    for text in ("for x in range(10):", " a", "", "def f(x): return 1"):
        ids = backend.encode(text).ids
        assert ids == ours.encode(text) and backend.decode(ids) == text


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes text (nmt_nfkc)"),
        ({"remove_extra_whitespaces": True}, "it has its own rules for whitespace"),
        ({"byte_fallback": False}, "it has no byte fallback"),
        ({"model_type": "char"}, "SentencePiece models of type char are not supported"),
        ({"user_defined_symbols": ["x"], "add_dummy_prefix": True}, "the package tokenizers would encode"),
    ],
)
def test_unsupported_models_are_reported(tmp_path: Path, settings: dict[str, object], reason: str) -> None:
    _, files, told = made(trained(tmp_path / "x.model", **settings))
    assert (files, told.startswith("no tokenizer.json is made from it: ")) == ({}, True)
    assert reason in told


def test_incompatible_protobuf_is_reported(
    monkeypatch: pytest.MonkeyPatch, models: Mapping[str, Path | None]
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    _, files, told = made(models["bpe"])
    assert files == {}
    assert told.startswith(
        "no tokenizer.json is made from it: the package sentencepiece needs another protobuf: import "
    )


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    files, told = export_tokenizer("ByteTokenizer", {}, "gpt2", POSITIONS)
    assert (files, told) == (
        {},
        "no tokenizer.json is made: it needs the package tokenizers: pip install 'megatron-adalrs[hf]'",
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@pytest.mark.parametrize(
    "named", [None, {"padding_side": "left"}, {"tokenizer_class": "PreTrainedTokenizerFast"}], ids=str
)
def test_tokenizer_json_gets_missing_settings(
    models: Mapping[str, Path | None],
    tmp_path: Path,
    named: dict[str, str] | None,
    config: type[PretrainedConfig],
) -> None:
    ours, files, _ = made(models["bpe"])
    (tmp_path / "tokenizer.json").write_bytes(files["tokenizer.json"])
    if named is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    config(vocab_size=600, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path)
    found = find_companion_files(tmp_path)
    added, told = export_tokenizer("HuggingFaceTokenizer", found, config.model_type, POSITIONS)
    for name, content in added.items():
        (tmp_path / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for name, text in TEXTS.items():
        if name != "markers":  # as everywhere, special tokens in texts are special tokens to a tokenizer.json
            assert theirs(text)["input_ids"] == ours.encode(text)
            assert theirs.decode(ours.encode(text)) == text
    assert (theirs.model_max_length, told) == (POSITIONS, "")
    if "tokenizer_class" not in (named or {}) or config is Qwen2Config:
        assert (theirs.eos_token, theirs.padding_side) == ("</s>", (named or {}).get("padding_side", "right"))


def test_renamed_tokenizer_json_splits_special_tokens(
    models: Mapping[str, Path | None], tmp_path: Path
) -> None:
    (tmp_path / "mine.json").write_bytes(made(models["bpe"])[1]["tokenizer.json"])
    (tmp_path / "tokenizer_config.json").write_text('{"split_special_tokens": true}')
    files = {"tokenizer.json": tmp_path / "mine.json"}
    added, _ = export_tokenizer("HuggingFaceTokenizer", files, "gpt2", POSITIONS)
    assert json.loads(added["tokenizer_config.json"])["split_special_tokens"] is True


def test_complete_files_are_unchanged(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    config = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 7}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    files = find_companion_files(tmp_path)
    assert export_tokenizer("HuggingFaceTokenizer", files, "qwen2", POSITIONS) == ({}, ""), "Qwen's own"
    (tmp_path / "tokenizer_config.json").unlink()
    files = find_companion_files(tmp_path)
    assert export_tokenizer(None, files, "gpt2", POSITIONS) == ({}, ""), "they came with a model"
