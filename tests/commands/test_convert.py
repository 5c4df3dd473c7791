"""Conversion to and from Hugging Face folders is exact and overwrites nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_adalrs.checkpoint import find_damage
from megatron_adalrs.checkpoint.manifest import sha256, write_manifest
from megatron_adalrs.data.tokenizer import HuggingFaceTokenizer, build_tokenizer
from megatron_adalrs.metrics.run_log import read_run
from megatron_adalrs.preprocessing.preprocess import Recipe, preprocess
from megatron_adalrs.preprocessing.tokenizer_training import train_sentencepiece
from tests.checkpoint.test_checkpoint import files_of, refusal, trained, values
from tests.helpers.programs import Done, called
from tests.helpers.ranks import Ranks
from tests.huggingface.models import KINDS, change_config, contents, made, saved

TEXT = (
    "Ein Text, der zweimal gesagt wird: naïve café, 東京 🙂.\n    def f(x):\n\treturn x <|endoftext|> end\n"
)


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    program = called("convert", monkeypatch, capsys)

    def run(*arguments: str | Path) -> Done:
        capsys.readouterr()  # what transformers has said
        return program(*arguments)

    return run


def refused(done: Done) -> str:
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_export_of_an_import_is_the_same_to_the_byte(
    tmp_path: Path, convert: Callable[..., Done], kind: str
) -> None:
    source = tmp_path / "theirs"
    made(kind).to(torch.bfloat16 if "untied" in kind else torch.float32).save_pretrained(
        source, max_shard_size="15KB"
    )
    (source / "tokenizer.json").write_text('{"not": "looked into"}')
    done = convert("--from-hf", source, "--to", tmp_path / "ours", "--max-shard-size", "2e-5")
    parameters = sum(parameter.numel() for parameter in made(kind).parameters())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n")[0] == (
        f"{tmp_path}/ours/iter_0000000: {parameters} parameters, for --finetune-from {tmp_path}/ours"
    )
    assert find_damage(tmp_path / "ours/iter_0000000", hashes=True) is None
    assert convert("--from", tmp_path / "ours", "--to-hf", tmp_path / "back")[::2] == (0, "")
    assert contents(tmp_path / "back") == contents(source)
    assert (tmp_path / "back/model.safetensors").exists(), "one file where there is room for all"
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    theirs, back = (
        AutoModelForCausalLM.from_pretrained(path).config.to_dict() for path in (source, tmp_path / "back")
    )
    unseen = {"_name_or_path", "transformers_version", "n_inner", "head_dim", "n_ctx"}
    assert {n: v for n, v in theirs.items() if n not in unseen} == {
        n: back[n] for n in theirs if n not in unseen
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ours", "theirs"], (
        "something was left behind"
    )


def test_other_precisions(tmp_path: Path, convert: Callable[..., Done]) -> None:
    source = saved(tmp_path / "theirs", "llama untied")
    convert("--from-hf", source, "--to", tmp_path / "ours")
    assert (
        convert("--from", tmp_path / "ours", "--to-hf", tmp_path / "b", "--dtype", "bfloat16").returncode == 0
    )
    theirs, ours = (AutoModelForCausalLM.from_pretrained(path) for path in (source, tmp_path / "b"))
    assert ours.dtype == torch.bfloat16
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value.bfloat16())
    assert convert("--from", tmp_path / "b", "--to-hf", tmp_path / "f", "--dtype", "float32").returncode == 0
    assert {dtype for dtype, *_ in contents(tmp_path / "f").values()} == {"F32"}


def test_refusals_leave_files_unchanged(tmp_path: Path, convert: Callable[..., Done]) -> None:
    source = saved(tmp_path / "theirs", "gpt2 tied")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("keep")
    for flags in [("--from-hf", source, "--to", full), ("--from", source, "--to-hf", full)]:
        assert f"{full} exists and is not an empty folder" in refused(convert(*flags))
    assert files_of(full) == ["mine"]
    new = tmp_path / "new"
    for flags in [
        (),
        ("--from-hf", source),
        ("--from-hf", source, "--to-hf", new),
        ("--to", new, "--from", source),
    ]:
        assert "give --from-hf with --to, or --from with --to-hf" in refused(convert(*flags))
    both = ("--from-hf", source, "--to", new)
    assert "dtype: float32: only --to-hf casts" in refused(convert(*both, "--dtype", "float32"))
    assert "max_shard_size: 0.0 GB: must be above 0" in refused(convert(*both, "--max-shard-size", "0"))
    assert f"--from-hf: {full} has no config.json" in refused(convert("--from-hf", full, "--to", new))
    assert f"--from: no checkpoint in {full}: expected" in refused(convert("--from", full, "--to-hf", new))
    change_config(source, scale_attn_weights=False)
    assert f"--from-hf: {source}/config.json: scale_attn_weights: False: " in refused(convert(*both))
    change_config(source, scale_attn_weights=True)
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-10])
    assert f"--from-hf: cannot read {source}/model.safetensors: " in refused(convert(*both))
    (source / "model.safetensors").unlink()
    assert f"--from-hf: {source} has neither model.safetensors nor" in refused(convert(*both))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "theirs"], "something was left behind"


def test_weights_only_checkpoint_cannot_be_resumed(
    one_rank: Ranks, data: Path, tmp_path: Path, convert: Callable[..., Done]
) -> None:
    source, ours = saved(tmp_path / "theirs", "qwen2 tied"), tmp_path / "ours"
    convert("--from-hf", source, "--to", ours)
    shape = {
        "preset": "qwen2-tiny",
        "num_layers": 2,
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "kv_channels": 6,
        "ffn_hidden_size": 40,
        "rotary_base": 10000.0,
        "vocab_size": 257,
        "hidden_dropout": 0.0,
        "train_iters": 1,
    }
    config = values(data, tmp_path / "run", **shape) | {"finetune_from": str(ours)}
    assert one_rank.run(trained, config) == [0]
    assert one_rank.run(
        trained, config | {"run_dir": str(tmp_path / "same"), "finetune_from": str(source)}
    ) == [0]
    begun, same = read_run(tmp_path / "run"), read_run(tmp_path / "same")
    assert (begun.events[0].weights_from, begun.events[0].weights_step) == (
        f"{ours.resolve()}/iter_0000000",
        0,
    )
    assert begun.train.loss.tolist() == same.train.loss.tolist()
    message = one_rank.run(
        refusal, config | {"run_dir": str(tmp_path / "b"), "finetune_from": None, "load": str(ours)}
    )
    assert message[0] == (
        f"--load: {ours}/iter_0000000 holds only weights and cannot be resumed: start a new run with "
        f"--finetune-from {ours}"
    )


def test_damaged_weights_only_checkpoint(tmp_path: Path, convert: Callable[..., Done]) -> None:
    ours = tmp_path / "ours"
    convert("--from-hf", saved(tmp_path / "theirs", "gpt2 tied"), "--to", ours)
    checkpoint = ours / "iter_0000000"
    weights = checkpoint / "weights/model.safetensors"
    tensors, content = load_file(weights), weights.read_bytes()
    weights.write_bytes(content[:-1])
    out = ("--to-hf", tmp_path / "out")
    assert "is damaged: weights/model.safetensors has" in refused(convert("--from", checkpoint, *out))

    def republished(changed: dict[str, Any]) -> str:
        save_file(changed, weights)
        (checkpoint / "manifest.json").unlink()
        write_manifest(
            checkpoint, {name: sha256(checkpoint / name) for name in files_of(checkpoint)}, {"step": 0}
        )
        return refused(convert("--from", checkpoint, *out))

    name = "final_norm.weight"
    assert f"{name} has shape [3], not [24]" in republished(tensors | {name: torch.zeros(3)})
    assert f"has no {name}" in republished({one: value for one, value in tensors.items() if one != name})
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["hidden_size"] = 25
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert "hidden_size: 25 is not divisible by num_attention_heads" in republished(tensors)
    state["config"]["hidden_size"] = 24
    del state["identity"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert "'identity'" in republished(tensors)


def hugging_face_tokenizer(folder: Path) -> Path:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def corpus(folder: Path, kind: str, model: Path | None) -> Path:
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(40)))
    preprocess(folder / "texts.jsonl", folder / "corpus", Recipe(kind, model))
    return folder / "corpus"


def test_export_includes_the_tokenizer(one_rank: Ranks, tmp_path: Path, convert: Callable[..., Done]) -> None:
    model = hugging_face_tokenizer(tmp_path / "tokenizer")
    kind = "HuggingFaceTokenizer"
    data, source = corpus(tmp_path, kind, model), saved(tmp_path / "theirs", "gpt2 tied", vocab_size=310)
    config = values(data, tmp_path / "run", vocab_size=None, train_iters=1, tokenizer_type=kind)
    assert one_rank.run(trained, config | {"tokenizer_model": str(model)}) == [0]
    done = convert("--from", tmp_path / "run", "--to-hf", tmp_path / "out")
    assert f"{model}/tokenizer.json is copied" in done.stdout
    ours, theirs = HuggingFaceTokenizer(model), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
    assert (theirs.eos_token_id, theirs.bos_token) == (ours.eod, None), "what lm_eval puts before a text"
    told = json.loads((tmp_path / "out/config.json").read_text())
    assert (told["eos_token_id"], told["vocab_size"]) == (ours.eod, ours.vocab_size)

    # One that came with the weights goes on with them, if it is what made the data.
    shutil.copy(model / "tokenizer.json", source)
    begun = {
        "finetune_from": str(source),
        "seq_length": 16,
        "lr": 1e-3,
        "train_iters": 1,
        "micro_batch_size": 4,
        "eval_iters": 1,
        "data_path": str(data),
        "split": "8,1,1",
        "run_dir": str(tmp_path / "begun"),
    }
    assert one_rank.run(trained, begun) == [0]
    done = convert("--from", tmp_path / "begun", "--to-hf", tmp_path / "out2")
    assert f"{source}/tokenizer.json is copied" in done.stdout
    assert json.loads((tmp_path / "out2/config.json").read_text())["vocab_size"] == 310
    # Else the one that is noted beside the data, as long as it is there.
    (source / "tokenizer.json").write_text("{}")
    done = convert("--from", tmp_path / "begun", "--to-hf", tmp_path / "noted")
    assert f"{model}/tokenizer.json is copied" in done.stdout
    shutil.rmtree(model)
    done = convert("--from", tmp_path / "begun", "--to-hf", tmp_path / "out3")
    assert f"{source}/tokenizer.json did not make {data}, no tokenizer is copied" in done.stdout
    shutil.rmtree(source)
    done = convert("--from", tmp_path / "begun", "--to-hf", tmp_path / "out4")
    assert f"there is no tokenizer in {source}, none is copied" in done.stdout
    assert not list((tmp_path / "out4").glob("tokenizer*"))


def test_sentencepiece_and_bytes(one_rank: Ranks, tmp_path: Path, convert: Callable[..., Done]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    model = tmp_path / "mine.model"
    train_sentencepiece([tmp_path], model, 340)
    for kind, file, told in [
        ("SentencePieceTokenizer", str(model), f"{model} is copied"),
        (
            "ByteTokenizer",
            None,
            "tokenizer.json is made: ids are the bytes of UTF-8, 256 (<|endoftext|>) ends",
        ),
    ]:
        folder = tmp_path / kind
        folder.mkdir()
        config = values(corpus(folder, kind, file and model), folder / "run", vocab_size=None, train_iters=1)
        assert one_rank.run(trained, config | {"tokenizer_type": kind, "tokenizer_model": file}) == [0]
        assert told in convert("--from", folder / "run", "--to-hf", folder / "out").stdout
        ours, theirs = build_tokenizer(kind, file), AutoTokenizer.from_pretrained(folder / "out")
        assert theirs(TEXT)["input_ids"] == ours.encode(TEXT) and theirs.decode(ours.encode(TEXT)) == TEXT
    assert (tmp_path / "SentencePieceTokenizer/out/tokenizer.model").read_bytes() == model.read_bytes()
    assert json.loads((tmp_path / "ByteTokenizer/out/config.json").read_text())["eos_token_id"] == 256
