from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from megatron_adalrs.data.tokenizer import (
    TOKENIZER_KINDS,
    ByteTokenizer,
    build_tokenizer,
    json_object,
)
from megatron_adalrs.huggingface.companion_files import find_companion_files, tokenizer_digests
from megatron_adalrs.preprocessing.tokenizer_training import train_sentencepiece
from tests.preprocessing.texts import TEXTS, require_protocol, write_corpus


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    train_sentencepiece([write_corpus(folder)], folder / "bpe.model", 600)
    return folder / "bpe.model"


@pytest.fixture(scope="module")
def hugging_face_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizers = pytest.importorskip(
        "tokenizers", reason="the package tokenizers (extra hf) is not installed"
    )
    folder = tmp_path_factory.mktemp("hugging_face")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|im_end|>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS.values(), trainer)
    backend.enable_truncation(max_length=8)
    backend.save(str(folder / "tokenizer.json"))
    return folder


def edited_copy(folder: Path, target: Path, **special: str) -> Path:
    """A copy whose two special tokens have other names, or are gone where the new name is empty."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [
        token | {"content": special.get(f"t{token['id']}", token["content"])}
        for token in content["added_tokens"]
        if special.get(f"t{token['id']}", "kept")
    ]
    vocabulary = content["model"]["vocab"]
    for old, key in (("<|im_end|>", "t0"), ("<|endoftext|>", "t1")):
        if key in special:
            vocabulary[special[key] or f"gone{key}"] = vocabulary.pop(old)
    (target / "tokenizer.json").write_text(json.dumps(content))
    return target


def test_byte_tokenizer() -> None:
    tokenizer = build_tokenizer("ByteTokenizer")
    require_protocol(tokenizer)
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert tokenizer.decode([97, 256, 195]) == "a\ufffd"
    assert tokenizer.sha256 == ByteTokenizer().sha256


def test_sentencepiece(sentencepiece_model: Path) -> None:
    tokenizer = build_tokenizer("SentencePieceTokenizer", sentencepiece_model)
    require_protocol(tokenizer)
    assert (tokenizer.vocab_size, tokenizer.eod) == (600, 2)
    assert tokenizer.sha256 == hashlib.sha256(sentencepiece_model.read_bytes()).hexdigest()
    code = TEXTS["code"]
    assert len(tokenizer.encode(code)) < len(code) / 2


def test_hugging_face(hugging_face_folder: Path) -> None:
    tokenizer = build_tokenizer("HuggingFaceTokenizer", hugging_face_folder)
    require_protocol(tokenizer)
    assert tokenizer.eod == 1
    assert tokenizer.encode("a<|endoftext|>b")[1] == 1
    model = hugging_face_folder / "tokenizer.json"
    assert tokenizer.sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    assert build_tokenizer("HuggingFaceTokenizer", model).encode("def f(x):") == tokenizer.encode("def f(x):")


def test_hugging_face_end_of_document(hugging_face_folder: Path, tmp_path: Path) -> None:
    def eod(**special: str) -> int:
        folder = edited_copy(hugging_face_folder, tmp_path, **special)
        return build_tokenizer("HuggingFaceTokenizer", folder).eod

    assert eod(t1="</s>") == 1
    assert eod(t0="<eos>", t1="<other>") == 0
    assert eod(t0="", t1="<only>") == 1
    with pytest.raises(ValueError, match=r"tokenizer\.json has none of <\|endoftext\|>, </s>, <eos>"):
        eod(t0="<one>", t1="<two>")


@pytest.mark.parametrize("entry", ["<|im_end|>", {"content": "<|im_end|>"}])
def test_hugging_face_configured_end_of_document(
    hugging_face_folder: Path, tmp_path: Path, entry: object
) -> None:
    edited_copy(hugging_face_folder, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": entry}))
    assert build_tokenizer("HuggingFaceTokenizer", tmp_path).eod == 0
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not a JSON object"):
        build_tokenizer("HuggingFaceTokenizer", tmp_path)


def test_digest_covers_split_special_tokens(hugging_face_folder: Path, tmp_path: Path) -> None:
    plain = build_tokenizer("HuggingFaceTokenizer", edited_copy(hugging_face_folder, tmp_path))
    found = []
    for setting in (False, True):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"split_special_tokens": setting}))
        found.append(build_tokenizer("HuggingFaceTokenizer", tmp_path))
        assert found[-1].sha256 == tokenizer_digests(find_companion_files(tmp_path))["HuggingFaceTokenizer"]
    text = "a<|endoftext|>b"
    assert (found[0].encode(text), found[0].sha256) == (plain.encode(text), plain.sha256)
    assert found[1].encode(text) != plain.encode(text) and found[1].sha256 != plain.sha256


def test_byte_order_marks_are_dropped(hugging_face_folder: Path, tmp_path: Path) -> None:
    for file in hugging_face_folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    with_marks, without = (
        build_tokenizer("HuggingFaceTokenizer", folder) for folder in (tmp_path, hugging_face_folder)
    )
    assert with_marks.encode("def f(x):") == without.encode("def f(x):")
    assert with_marks.eod == without.eod


def test_keys_given_twice_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a", "eos_token": "b"}')
    with pytest.raises(ValueError, match=r"is not a JSON object: .*eos_token"):
        json_object(tmp_path / "tokenizer_config.json")


def test_hugging_face_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ValueError, match=r"needs the package tokenizers: pip install 'megatron-adalrs\[hf\]'"
    ):
        build_tokenizer("HuggingFaceTokenizer", tmp_path)


@pytest.mark.parametrize("kind", TOKENIZER_KINDS[:2])
def test_unreadable_models_are_refused(kind: str, tmp_path: Path) -> None:
    if kind == "HuggingFaceTokenizer":
        pytest.importorskip("tokenizers", reason="the package tokenizers (extra hf) is not installed")
    (tmp_path / "x").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"x is not a "):
        build_tokenizer(kind, tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=r"tokenizer file .*missing: there is no such file"):
        build_tokenizer(kind, tmp_path / "missing")
    with pytest.raises(ValueError, match=f"tokenizer model: required for {kind}"):
        build_tokenizer(kind)


def test_wrong_kinds_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"tokenizer type 'GPT2': required one of SentencePieceTokenizer, .*Byte"
    ):
        build_tokenizer("GPT2")
    with pytest.raises(ValueError, match="tokenizer model x: ByteTokenizer takes none"):
        build_tokenizer("ByteTokenizer", "x")


def test_sentencepiece_without_eos_is_refused(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    with (tmp_path / "x.model").open("wb") as stream:
        SentencePieceTrainer.train(
            sentence_iterator=iter(["some words", "more words"]),
            model_writer=stream,
            vocab_size=20,
            hard_vocab_limit=False,
            eos_id=-1,
            minloglevel=2,
        )
    with pytest.raises(ValueError, match=r"x\.model has no end-of-sentence piece"):
        build_tokenizer("SentencePieceTokenizer", tmp_path / "x.model")
