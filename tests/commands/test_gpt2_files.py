"""GPT-2's vocab.json and merges.txt, from text to export, and for a model with only these files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer

from megatron_adalrs.data.description import read_description
from megatron_adalrs.data.tokenizer import build_tokenizer
from megatron_adalrs.preprocessing.preprocess import Recipe, preprocess
from tests.checkpoint.test_checkpoint import refusal, trained, values
from tests.commands.test_preprocess import run
from tests.helpers.programs import Done, called
from tests.helpers.ranks import Ranks
from tests.huggingface.models import saved
from tests.preprocessing.texts import TEXTS, gpt2_files

KIND = "GPT2BPETokenizer"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpt2_files(tmp_path_factory.mktemp("gpt2"))


def paths(folder: Path) -> tuple[Path, Path]:
    return folder / "vocab.json", folder / "merges.txt"


@pytest.fixture
def tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], Callable[..., Done]]:
    return lambda name: called(name, monkeypatch, capsys)


def test_from_texts_to_transformers(
    one_rank: Ranks, tool: Callable[[str], Callable[..., Done]], files: Path, tmp_path: Path
) -> None:
    text = TEXTS["code"][:2000]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(9)))
    vocab, merges = map(str, paths(files))
    named = {"vocab_file": vocab, "merge_file": merges}
    flags = ("--tokenizer-type", KIND, "--vocab-file", vocab, "--merge-file", merges)
    out = ("--input", tmp_path / "texts.jsonl", "--output-prefix", tmp_path / "corpus")
    assert run(*out, *flags).returncode == 0
    noted = read_description(tmp_path / "corpus")
    ours = build_tokenizer(KIND, None, vocab, merges)
    assert noted and (noted.tokenizer_type, noted.tokenizer_sha256) == (KIND, ours.sha256)
    assert tool("check_data")(tmp_path / "corpus", *flags).returncode == 0
    other = tool("check_data")(tmp_path / "corpus", "--tokenizer-type", "ByteTokenizer")
    assert (other.returncode, "tokenizer_type: ByteTokenizer (SHA-256 " in other.stderr) == (2, True)
    assert "merge_file: required" in run(*out, "--overwrite", *flags[:4]).stderr

    # With flags, and with nothing but the note beside the data.
    config = values(tmp_path / "corpus", tmp_path / "run", vocab_size=None, train_iters=1)
    assert one_rank.run(trained, config | {"tokenizer_type": KIND, **named}) == [0]
    assert one_rank.run(trained, config | {"run_dir": str(tmp_path / "unnamed")}) == [0]
    done = tool("convert")("--from", tmp_path / "unnamed", "--to-hf", tmp_path / "hf2")
    assert f"{vocab} is copied\ntokenizer.json is made from it" in done.stdout
    done = tool("convert")("--from", tmp_path / "run", "--to-hf", tmp_path / "hf")
    assert f"{vocab} is copied\ntokenizer.json is made from it" in done.stdout
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "hf" / name).read_bytes() == (files / name).read_bytes()
    theirs, exported = GPT2Tokenizer.from_pretrained(files), AutoTokenizer.from_pretrained(tmp_path / "hf")
    for each in (*TEXTS.values(), "one<|endoftext|>two"):
        assert exported(each)["input_ids"] == theirs(each)["input_ids"]
    assert exported.eos_token_id == ours.eod


def test_other_files_than_made_the_data_are_refused(one_rank: Ranks, files: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": TEXTS["code"]}) + "\n")
    preprocess(tmp_path / "texts.jsonl", tmp_path / "corpus", Recipe(KIND, None, "text", True, *paths(files)))
    shutil.copy(files / "vocab.json", tmp_path)
    (tmp_path / "merges.txt").write_text((files / "merges.txt").read_text().rsplit("\n", 2)[0] + "\n")
    vocab, merges = map(str, paths(tmp_path))
    named = {"vocab_size": None, "tokenizer_type": KIND, "vocab_file": vocab, "merge_file": merges}
    (message,) = one_rank.run(refusal, values(tmp_path / "corpus", tmp_path / "run", **named))
    assert (
        f"vocab_file: {vocab} (SHA-256 " in message
        and f"is not the tokenizer of {tmp_path}/corpus" in message
    )


def test_model_with_gpt2_files_generates(
    tool: Callable[[str], Callable[..., Done]], files: Path, tmp_path: Path
) -> None:
    for kind, code in (("gpt2 tied", 0), ("llama untied", 2)):
        folder = saved(tmp_path / kind, kind, vocab_size=500)
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(files / name, folder)
        assert tool("convert")("--from-hf", folder, "--to", tmp_path / f"ours {kind}").returncode == 0
        for model in (folder, tmp_path / f"ours {kind}"):
            done = tool("generate")(model, "--prompt", "for", "--max-new-tokens", 3)
            assert done.returncode == code, done.stderr
    assert "names no tokenizer; give --tokenizer-type and its files" in done.stderr
    named = ("--vocab-file", files / "vocab.json", "--merge-file", files / "merges.txt")
    assert tool("generate")(folder, "--prompt", "for", "--tokenizer-type", KIND, *named).returncode == 0
    done = tool("generate")(folder, "--prompt", "for", *named)
    assert f"vocab_file: {files}/vocab.json: give --tokenizer-type too" in done.stderr
