"""The tokenizer of a model must be that of a run's data, in any file format."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer

from megatron_adalrs.checkpoint.tokenizer_files import require_matching_tokenizer, tokenizer_of_run
from megatron_adalrs.config import DataConfig, ModelConfig
from megatron_adalrs.data.tokenizer import DataTokenizer, build_tokenizer
from megatron_adalrs.huggingface.companion_files import find_companion_files
from megatron_adalrs.huggingface.tokenizer_export import export_tokenizer
from megatron_adalrs.preprocessing.preprocess import Recipe, preprocess
from megatron_adalrs.preprocessing.tokenizer_training import train_sentencepiece
from tests.checkpoint.test_checkpoint import refusal, trained, values
from tests.helpers.programs import Done, called
from tests.helpers.ranks import Ranks
from tests.huggingface.models import saved
from tests.preprocessing.texts import TEXTS, gpt2_files, write_corpus

MODEL = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, seq_length=8)
HF, SP, GPT2, BYTES = "HuggingFaceTokenizer", "SentencePieceTokenizer", "GPT2BPETokenizer", "ByteTokenizer"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two tokenizer.json, a SentencePiece model, and vocab.json with merges.txt."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, text in (("one", TEXTS["code"]), ("two", TEXTS["scripts"] * 3)):
        trainer = ByteLevelBPETokenizer()
        trainer.train_from_iterator([text], 300, special_tokens=["<|endoftext|>"], show_progress=False)
        (folder / name).mkdir()
        trainer.save(str(folder / name / "tokenizer.json"))
    train_sentencepiece([write_corpus(folder)], folder / "mine.model", 600)
    gpt2_files(folder)
    return folder


def of_data(kind: str, *files: Path | None, known: bool = True) -> DataTokenizer:
    """Return the tokenizer of a data set; `known` says if its files are known, or only its digest."""
    sha256 = build_tokenizer(kind, *files).sha256
    return DataTokenizer(kind, sha256, "corpus.json", files if known or not files else None)


def exported(folder: Path, kind: str, **files: Path) -> Path:
    folder.mkdir()
    named = {name.replace("_", "."): path for name, path in files.items()}
    contents = {name: path.read_bytes() for name, path in named.items()}
    contents |= export_tokenizer(kind, named, "gpt2", 1024)[0]
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def accepted(folder: Path, tokenizer: DataTokenizer) -> bool:
    require_matching_tokenizer(find_companion_files(folder), MODEL, tokenizer, "--from")
    return True


def refused(folder: Path, tokenizer: DataTokenizer) -> str:
    with pytest.raises(ValueError, match="--from: ") as error:
        accepted(folder, tokenizer)
    assert f"{folder}/" in str(error.value) and "corpus.json" in str(error.value)
    return str(error.value)


def test_another_tokenizer_is_refused(made: Path) -> None:
    one = made / "one/tokenizer.json"
    told = refused(made / "two", of_data(HF, one))
    digest = build_tokenizer(HF, one).sha256
    assert told == (
        f"--from: {made}/two/tokenizer.json is not the tokenizer of this run's data, corpus.json ({HF}, "
        f"SHA-256 "
        f"{digest:.12}): they must be the same"
    )
    assert "if it is, give --tokenizer-type and its files" in refused(
        made / "two", of_data(HF, one, known=False)
    )
    refused(made / "two", of_data(SP, made / "mine.model"))
    refused(made / "two", of_data(BYTES))


def test_same_tokenizer_is_accepted(made: Path, tmp_path: Path) -> None:
    one = made / "one/tokenizer.json"
    assert accepted(tmp_path, of_data(HF, one)), "a folder without any"
    (tmp_path / "tokenizer.json").write_bytes(one.read_bytes())
    assert accepted(tmp_path, of_data(HF, one, known=False)), "a copy"
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(one.read_text()), indent=7))
    assert accepted(tmp_path, of_data(HF, one)), "saved anew"
    (tmp_path / "tokenizer.json").write_text("not readable here")
    assert accepted(tmp_path, of_data(BYTES)), "nothing can be told"
    changed = replace(of_data(SP, made / "mine.model"), sha256="0" * 64)
    assert accepted(made / "one", changed), "the file that was noted is another now"
    assert accepted(made / "one", of_data(SP, made / "mine.model", known=False)), (
        "nothing but digests of unlike files"
    )


def test_exported_tokenizer_is_recognized(made: Path, tmp_path: Path) -> None:
    model, vocab, merges = made / "mine.model", made / "vocab.json", made / "merges.txt"
    gpt2 = of_data(GPT2, None, vocab, merges, known=False)
    sentencepiece = of_data(SP, model, known=False)
    folders = {
        of_data(BYTES): exported(tmp_path / "bytes", BYTES),
        sentencepiece: exported(tmp_path / "mine", SP, tokenizer_model=model),
        gpt2: exported(tmp_path / "gpt2", GPT2, vocab_json=vocab, merges_txt=merges),
    }
    (tmp_path / "mine/tokenizer.model").unlink()
    for tokenizer, folder in folders.items():
        for other, elsewhere in folders.items():
            if tokenizer is other:
                assert accepted(folder, tokenizer)
                assert accepted(folder, of_data(HF, folder / "tokenizer.json"))
            else:
                refused(elsewhere, tokenizer)


@pytest.mark.parametrize("content", [None, "another"])
def test_changed_tokenizer_path_falls_back_to_note(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    preprocess(write_corpus(tmp_path), tmp_path / "corpus", Recipe(SP, made / "mine.model"))
    data = DataConfig(
        data_path=(f"{tmp_path}/corpus",), tokenizer_type=SP, tokenizer_model=Path("mine.model")
    )
    if content:
        Path("mine.model").write_text(content)
    found = tokenizer_of_run({}, data, 600)
    assert (dict(found.files), found.note) == (
        {"tokenizer.model": made / "mine.model"},
        f"{made}/mine.model is copied",
    )
    untyped = DataConfig(data_path=(f"{tmp_path}/corpus",), tokenizer_model=made / "mine.model")
    assert dict(tokenizer_of_run({}, untyped, 600).files) == {"tokenizer.model": made / "mine.model"}, (
        "the note's kind"
    )
    (tmp_path / "corpus.json").unlink()
    note = "mine.model is copied" if content else "there is no tokenizer in mine.model, none is copied"
    assert tokenizer_of_run({}, data, 600).note == note, "nothing else tells"


def test_run_from_exported_folder(
    one_rank: Ranks,
    tmp_path: Path,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = exported(tmp_path / "theirs", BYTES)
    saved(source, "gpt2 tied", vocab_size=600)
    texts = write_corpus(tmp_path)
    texts.write_text(texts.read_text() * 9)
    for name, recipe in (("bytes", Recipe(BYTES)), ("mine", Recipe(SP, made / "mine.model"))):
        preprocess(texts, tmp_path / name, recipe)
    convert: Callable[..., Done] = called("convert", monkeypatch, capsys)
    assert convert("--from-hf", source, "--to", tmp_path / "alone").returncode == 0
    begin = {
        "finetune_from": str(source),
        "seq_length": 16,
        "train_iters": 1,
        "lr": 1e-3,
        "micro_batch_size": 4,
        "eval_iters": 1,
        "vocab_size": 600,
        "split": "8,1,1",
    }
    other = {"data_path": f"{tmp_path}/mine", "run_dir": str(tmp_path / "other")}
    (message,) = one_rank.run(refusal, begin | other)
    assert message.startswith(
        f"--finetune-from: {source}/tokenizer.json is not the tokenizer of this run's data, "
        f"{tmp_path}/mine.json"
    )
    alone = values(
        tmp_path / "mine", tmp_path / "other", vocab_size=600, finetune_from=str(tmp_path / "alone")
    )
    assert (
        "alone/iter_0000000/tokenizer/tokenizer.json is not the tokenizer of"
        in one_rank.run(refusal, alone)[0]
    )
    assert not (tmp_path / "other/metrics.jsonl").exists()
    own = {"data_path": f"{tmp_path}/bytes", "run_dir": str(tmp_path / "own")}
    assert one_rank.run(trained, begin | own) == [0]
    assert convert("--from", tmp_path / "own", "--to-hf", tmp_path / "again").returncode == 0
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
