"""Evaluation and generation with a run and with its export."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_adalrs.checkpoint import locate_model, open_model
from megatron_adalrs.config import DataConfig
from megatron_adalrs.data.indexed_dataset import IndexedDataset
from megatron_adalrs.data.indexed_dataset_builder import IndexedDatasetBuilder
from megatron_adalrs.huggingface.tokenizer_export import export_tokenizer
from megatron_adalrs.inference.evaluation import windows
from megatron_adalrs.inference.model import whole_model
from megatron_adalrs.metrics.run_log import read_run
from tests.data.corpora import counting_corpus
from tests.helpers.programs import Done, called
from tests.helpers.ranks import Ranks
from tests.huggingface.models import made, saved
from tests.inference.runs import SENTENCE, run_on_bytes


@pytest.fixture(scope="module")
def run(one_rank: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_on_bytes(one_rank, tmp_path_factory.mktemp("bytes"))


@pytest.fixture
def tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], Callable[..., Done]]:
    return lambda name: called(name, monkeypatch, capsys)


def test_perplexity_equals_that_of_transformers(
    tool: Callable[[str], Callable[..., Done]], run: Path, tmp_path: Path
) -> None:
    evaluate = tool("evaluate")
    done = evaluate(run, "--json")
    assert done.returncode == 0, done.stderr
    ours = json.loads(done.stdout)
    assert ours["step"] == 120 and ours["seq_length"] == 32
    assert ours["loss"] == pytest.approx(read_run(run).evaluations[-2].loss, abs=0.1), (
        "the run's, of random samples"
    )
    assert ours["perplexity"] == pytest.approx(math.exp(ours["loss"]))

    assert tool("convert")("--from", run, "--to-hf", tmp_path / "hf").returncode == 0
    indexed = IndexedDataset(run.parent / "corpus")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    total, tokens = 0.0, 0
    with torch.no_grad():
        for window, predicted in windows(indexed, range(32, 36), 32):
            batch = torch.from_numpy(window)[None]
            logits = theirs(batch[:, :-1]).logits
            total += float(torch.nn.functional.cross_entropy(logits[0], batch[0, 1:], reduction="sum"))
            tokens += predicted
    assert (ours["loss"], ours["tokens"]) == (pytest.approx(total / tokens, rel=1e-4), tokens)
    exported = json.loads(
        evaluate(
            tmp_path / "hf",
            "--data-path",
            run.parent / "corpus",
            "--split",
            "8,1,1",
            "--seq-length",
            32,
            "--json",
        ).stdout
    )
    assert exported["loss"] == pytest.approx(ours["loss"], rel=1e-6)
    assert exported["bits_per_byte"] == pytest.approx(ours["bits_per_byte"], rel=1e-6)
    words = evaluate(run, "--part", "all", "--max-tokens", 100, "--batch-size", 2).stdout
    assert (
        f"{run}/checkpoints/iter_0000120 on {run.parent}/corpus (all)\nloss 0." in words
        and "128 tokens" in words
    )


def test_bits_per_byte_of_the_text(
    tool: Callable[[str], Callable[..., Done]], run: Path, tmp_path: Path
) -> None:
    evaluate = tool("evaluate")
    found = json.loads(evaluate(run, "--json").stdout)
    # Four documents of a byte a token and an end; the first byte of all is not predicted.
    length = len(SENTENCE) * 8
    assert (found["tokens"], found["bytes"]) == (4 * (length + 1) - 1, 4 * length - 1)
    assert found["bits_per_byte"] == pytest.approx(
        found["loss"] / math.log(2) * found["tokens"] / found["bytes"]
    )
    apart = json.loads(evaluate(run, "--documents-apart", "--json").stdout)
    assert apart["tokens"] == apart["bytes"] == 4 * length
    assert (
        f"{apart['bits_per_byte']:.4f} bits per byte, 864 tokens" in evaluate(run, "--documents-apart").stdout
    )

    assert tool("convert")("--from", run, "--to-hf", tmp_path / "hf").returncode == 0
    corpus = (
        tmp_path / "hf",
        "--data-path",
        run.parent / "corpus",
        "--part",
        "all",
        "--max-tokens",
        9,
        "--json",
    )
    exported = json.loads(evaluate(*corpus).stdout)
    assert exported["bytes"] == exported["tokens"], "its tokenizer.json was made from what made the corpus"
    # A folder without a tokenizer, until one is named; one window has no error, which JSON cannot say as a
    # number.
    (tmp_path / "hf/tokenizer.json").unlink()
    done = evaluate(*corpus)
    told = json.loads(done.stdout)
    assert (told["bits_per_byte"], told["bytes"], told["loss_error"]) == (None, None, None)
    assert "bits per byte are unknown: tokenizer_type: " in done.stderr
    assert (
        json.loads(evaluate(*corpus, "--tokenizer-type", "ByteTokenizer").stdout)["bytes"] == told["tokens"]
    )


def test_a_corpus_of_another_tokenizer_is_refused(
    tool: Callable[[str], Callable[..., Done]], run: Path, tmp_path: Path
) -> None:
    for name in ("corpus.bin", "corpus.idx"):
        (tmp_path / name).symlink_to(run.parent / name)
    note = json.loads((run.parent / "corpus.json").read_text())
    (tmp_path / "corpus.json").write_text(json.dumps(note | {"tokenizer_sha256": "1" * 64}))
    other = ("--data-path", tmp_path / "corpus", "--part", "all", "--max-tokens", 9)
    done = tool("evaluate")(run, *other)
    assert (
        done.returncode == 2
        and f"{run}/checkpoints/iter_0000120 was trained with a different tokenizer" in done.stderr
    )
    hf = saved(tmp_path / "theirs", "gpt2 tied")
    done = tool("evaluate")(hf, *other, "--tokenizer-type", "ByteTokenizer")
    assert done.returncode == 2
    assert (
        f"tokenizer_type: ByteTokenizer (SHA-256 {note['tokenizer_sha256']:.12}) is not the tokenizer of"
        in done.stderr
    )
    assert tool("convert")("--from", run, "--to-hf", tmp_path / "hf").returncode == 0
    unlike = {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_sha256": "1" * 64}
    (tmp_path / "corpus.json").write_text(json.dumps(note | unlike))
    done = tool("evaluate")(tmp_path / "hf", *other)
    assert (
        done.returncode == 2
        and f"data_path: {tmp_path}/hf/tokenizer.json is not the tokenizer of" in done.stderr
    )
    # Where nothing tells whether two kinds are the same, the loss is given, and the text is not counted.
    settings = tmp_path / "hf/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"made_from": None}))
    done = tool("evaluate")(tmp_path / "hf", *other, "--documents-apart", "--json")
    assert (done.returncode, json.loads(done.stdout)["bits_per_byte"]) == (0, None)
    assert "corpus was made with a SentencePieceTokenizer; give --tokenizer-type" in done.stderr


def test_tokens_unknown_to_tokenizer_are_no_text(
    tool: Callable[[str], Callable[..., Done]], tmp_path: Path
) -> None:
    with IndexedDatasetBuilder(tmp_path / "corpus", np.uint16) as builder:
        builder.add_document([1, 299, 2])
        builder.finalize()
    model = saved(tmp_path / "theirs", "gpt2 tied", vocab_size=300)
    corpus = (model, "--data-path", tmp_path / "corpus", "--part", "all")
    told = f"{tmp_path}/corpus.bin holds token 299: required 0 to 256"
    refused = tool("evaluate")(*corpus, "--tokenizer-type", "ByteTokenizer")
    assert refused.returncode == 2 and told in refused.stderr
    for name, content in export_tokenizer("ByteTokenizer", {}, "gpt2", 64)[0].items():
        (model / name).write_bytes(content)
    done = tool("evaluate")(*corpus, "--json")
    assert (done.returncode, json.loads(done.stdout)["bits_per_byte"]) == (0, None)
    assert f"bits per byte are unknown: {told}" in done.stderr


def test_the_corpus_of_a_part_is_the_runs_own(
    tool: Callable[[str], Callable[..., Done]], run: Path, tmp_path: Path
) -> None:
    tool("evaluate")
    program = importlib.import_module("megatron_adalrs.commands.evaluate")
    opened = open_model(locate_model(run, "model"), "model")

    def corpus(part: str, **data: Any) -> tuple[str, str | None]:
        return program.corpus_of(program.Arguments(run, part=part), replace(opened, data=DataConfig(**data)))

    assert corpus("test", data_path=("a",), split="8,1,1") == ("a", "8,1,1")
    separate = {"train_data_path": ("a",), "valid_data_path": ("b",)}
    assert (corpus("train", **separate), corpus("valid", **separate)) == (("a", "1,0,0"), ("b", "0,1,0"))
    with pytest.raises(ValueError, match="has several: a, b; give --data-path"):
        corpus("all", **separate)
    with pytest.raises(ValueError, match="has several: b, c; give --data-path"):
        corpus("valid", **separate | {"valid_data_path": ("b", "c")})


def test_exported_folder_is_self_contained(
    tool: Callable[[str], Callable[..., Done]], run: Path, tmp_path: Path
) -> None:
    assert tool("convert")("--from", run, "--to-hf", tmp_path / "hf").returncode == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    inputs = tokenizer(SENTENCE[:9] + "é", return_tensors="pt")
    ids = torch.tensor([[*(SENTENCE[:9] + "é").encode()]])
    assert torch.equal(inputs["input_ids"], ids)
    opened = open_model(locate_model(run, "model"), "model")
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(whole_model(opened).logits(ids)[0, :-1], ids[0, 1:])
        assert float(theirs(**inputs, labels=ids).loss) == pytest.approx(float(loss), rel=1e-5)
    prompt = tokenizer(SENTENCE + "abcd", return_tensors="pt")
    said = theirs.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=256)
    assert tokenizer.decode(said[0]) == SENTENCE + "abcdefghi"
    assert (
        tool("generate")(tmp_path / "hf", "--prompt", SENTENCE + "abcd", "--max-new-tokens", 5).stdout
        == "efghi\n"
    )


def test_completion_is_memorized_text(
    tool: Callable[[str], Callable[..., Done]], run: Path, tmp_path: Path
) -> None:
    generate = tool("generate")
    done = generate(run, "--prompt", SENTENCE + "abcd", "--max-new-tokens", 12)
    assert (done.returncode, done.stdout) == (0, "efghijklmnop\n")
    assert "12 tokens, " in done.stderr
    (tmp_path / "prompt.txt").write_text(SENTENCE + "abcd")
    sampled = generate(
        run,
        "--prompt-file",
        tmp_path / "prompt.txt",
        "--max-new-tokens",
        5,
        "--temperature",
        0.1,
        "--samples",
        2,
    )
    assert sampled.stdout == "--- 1\nefghi\n--- 2\nefghi\n"
    # 64 positions: fewer tokens than asked for.
    assert "ended before the limit" in generate(run, "--prompt", "klmn", "--max-new-tokens", 500).stderr


def test_greedy_completions_are_those_of_transformers(
    tool: Callable[[str], Callable[..., Done]], tmp_path: Path
) -> None:
    source = saved(tmp_path / "theirs", "llama untied")
    prompt = [72, 105, 33]
    theirs = made("llama untied").generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=256, pad_token_id=256
    )[0, 3:]
    done = tool("generate")(
        source, "--prompt", bytes(prompt).decode(), "--max-new-tokens", 8, "--tokenizer-type", "ByteTokenizer"
    )
    expected = bytes(token for token in theirs.tolist() if token < 256).decode(errors="replace")
    assert done.stdout == expected + "\n"


def test_impossible_flags_give_one_sentence(
    tool: Callable[[str], Callable[..., Done]], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = saved(tmp_path / "theirs", "gpt2 tied")
    other = counting_corpus(tmp_path / "counting")
    (tmp_path / "latin-1").write_bytes("naïve".encode("latin-1"))
    capsys.readouterr()  # what transformers has said
    for name, flags, message in [
        ("evaluate", (tmp_path / "nothing",), "model: no checkpoint in"),
        ("evaluate", (hf,), "give --data-path"),
        ("evaluate", (hf, "--data-path", other), f"split: unknown for {other}; give --split, or --part all"),
        ("evaluate", (run, "--data-path", tmp_path / "none"), "none.idx"),
        ("evaluate", (run, "--seq-length", 65), "seq_length: 65: the model has 64 positions"),
        ("evaluate", (run, "--batch-size", 0), "batch_size: 0: must be at least 1"),
        ("evaluate", (run, "--split", "1,0,1"), "part: the valid part of"),
        (
            "evaluate",
            (hf, "--data-path", other, "--part", "all", "--documents-apart"),
            "documents_apart: the end-of-",
        ),
        ("generate", (run,), "prompt: give either --prompt or --prompt-file"),
        ("generate", (run, "--prompt", "a", "--top-p", 0), "top_p: 0.0: must be above 0"),
        ("generate", (run, "--prompt", "a" * 64), "prompt: has 64 tokens: the model has 64 positions"),
        ("generate", (run, "--prompt", "a", "--max-new-tokens", 0), "max_new_tokens: 0"),
        ("generate", (run, "--prompt", "a", "--dtype", "int8"), "dtype: int8: must be float32 or bfloat16"),
        ("generate", (run, "--prompt", "a", "--seed", "-1"), "seed: -1: must be 0 to 2^63 - 1"),
        ("generate", (run, "--prompt", "a", "--seed", 2**63), f"seed: {2**63}: must be"),
        ("generate", (run, "--prompt", b"a\xff".decode(errors="surrogateescape")), "prompt: it is not UTF-8"),
        ("generate", (run, "--prompt-file", tmp_path / "latin-1"), "latin-1 is not UTF-8"),
        ("generate", (run, "--prompt-file", tmp_path / "none"), "No such file"),
        ("generate", (hf, "--prompt", "a"), "names no tokenizer; give --tokenizer-type"),
    ]:
        done = tool(name)(*flags)
        assert (done.returncode, done.stdout) == (2, ""), flags
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert message in done.stderr
