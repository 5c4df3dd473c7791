"""`--finetune-from` a Hugging Face folder on any mesh, training, export, and the loss in transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from megatron_adalrs.cli.arguments import config_from_values, parse_arguments
from megatron_adalrs.huggingface.config_json import Shape
from megatron_adalrs.metrics.run_log import read_run
from megatron_adalrs.training.data import batches_in_one_pass, build_datasets
from tests.checkpoint.test_checkpoint import refusal, trained
from tests.helpers.programs import Done, called
from tests.helpers.ranks import Ranks
from tests.huggingface.models import change_config, saved

BATCH = 4
GRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "tensor": ("qwen2 tied", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pipe": ("gpt2 tied", {"pipeline_model_parallel_size": 2}),
    "zero3": ("llama scaled", {"zero_stage": 3}),
}


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    return called("convert", monkeypatch, capsys)


def values(data: Path, run: Path, source: Path, **changes: Any) -> dict[str, Any]:
    """Return values without a model shape, which the Hugging Face folder has."""
    return {
        "finetune_from": str(source),
        "seq_length": 16,
        "data_path": str(data),
        "split": "8,1,1",
        "lr": 1e-2,
        "micro_batch_size": BATCH,
        "global_batch_size": BATCH,
        "train_iters": 4,
        "eval_iters": 5,
        "run_dir": str(run),
    } | changes


@torch.no_grad()
def loss_in_transformers(folder: Path, config: dict[str, Any]) -> float:
    """Return the loss on the samples of the final evaluation."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    valid = build_datasets(config_from_values(config), BATCH).valid[0].dataset
    samples = range(batches_in_one_pass(valid, config["eval_iters"], BATCH) * BATCH)
    tokens = torch.stack([torch.from_numpy(valid[number]) for number in samples])
    return cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


def last_validation(run: Path) -> float:
    return [one.loss for one in read_run(run).evaluations if one.split == "valid"][-1]


@pytest.mark.parametrize("mesh", GRIDS)
def test_import_train_on_mesh_and_export(
    one_rank: Ranks, two_ranks: Ranks, data: Path, tmp_path: Path, convert: Callable[..., Done], mesh: str
) -> None:
    kind, axes = GRIDS[mesh]
    source = saved(tmp_path / "theirs", kind, vocab_size=50)
    one = values(data, tmp_path / "one", source)
    assert one_rank.run(trained, one) == [0]
    start = read_run(tmp_path / "one").events[0]
    assert (start.weights_from, start.weights_step) == (str(source.resolve()), None)
    two = values(
        data, tmp_path / "two", source, micro_batch_size=BATCH // (2 if mesh == "zero3" else 1), **axes
    )
    assert two_ranks.run(trained, two) == [0, 0]
    expected = read_run(tmp_path / "one").train.loss.tolist()
    assert read_run(tmp_path / "two").train.loss.tolist() == pytest.approx(expected, rel=1e-4)
    assert read_run(tmp_path / "two").train.loss[0] == pytest.approx(expected[0], rel=1e-5)
    # Both began with the loss that transformers knows: a run whose rate is next to nothing ends with it, too.
    idle = values(data, tmp_path / "idle", source, lr=1e-12, train_iters=1)
    assert one_rank.run(trained, idle) == [0]
    assert last_validation(tmp_path / "idle") == pytest.approx(loss_in_transformers(source, idle), rel=1e-5)

    exported = tmp_path / "exported"
    done = convert("--from", tmp_path / "two", "--to-hf", exported)
    assert done.returncode == 0
    assert f"{exported}: the model of {tmp_path}/two/checkpoints/iter_0000004, step 4" in done.stdout
    assert Shape(exported).fields == Shape(source).fields, (
        "the longest sequence too, though it trained on shorter ones"
    )
    ended = last_validation(tmp_path / "two")
    assert ended < last_validation(tmp_path / "idle") - 0.1, "it learned nothing"
    assert loss_in_transformers(exported, two) == pytest.approx(ended, rel=1e-3)
    on = values(data, tmp_path / "on", exported, lr=1e-12, train_iters=1)
    assert one_rank.run(trained, on) == [0]
    assert last_validation(tmp_path / "on") == pytest.approx(ended, rel=1e-5)


def test_finetuned_run_resumes_without_the_folder(
    one_rank: Ranks, data: Path, tmp_path: Path, convert: Callable[..., Done]
) -> None:
    source = saved(tmp_path / "theirs", "llama untied", vocab_size=50)
    job = values(data, tmp_path / "job", source, auto_resume=True, exit_interval=2, zero_stage=1, bf16=True)
    assert one_rank.run(trained, job) == [143]
    shutil.rmtree(source)
    again = resumed_values(tmp_path / "job") | {"auto_resume": True}
    assert one_rank.run(trained, again) == [0]
    assert read_run(tmp_path / "job").train.step.tolist() == [1, 2, 3, 4]
    done = convert("--from", tmp_path / "job/checkpoints/iter_0000002", "--to-hf", tmp_path / "exported")
    assert done.returncode == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").dtype == torch.bfloat16


def resumed_values(run: Path) -> dict[str, Any]:
    """Return the values of the config.yaml of a run."""
    config = parse_arguments(["--config", str(run / "config.yaml")])
    return config.to_flat()


def test_given_shape_must_match_the_folder(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    source = saved(tmp_path / "theirs", "llama untied", vocab_size=64)

    def refused(**changes: Any) -> str:
        message = one_rank.run(refusal, values(data, tmp_path / "run", source, **changes))[0]
        assert message.startswith("--finetune-from: ") and "\n" not in message
        return message

    assert f"{source} has hidden_size 24, this run has 36" in refused(hidden_size=36, kv_channels=6)
    assert f"{source} has vocab_size 64, this run has 50; use --vocab-size 64" in refused(vocab_size=50)
    assert f"{source} has rotary_base 10000.0, this run has 7.0" in refused(rotary_base=7.0)
    assert f"{source} has use_rope_scaling False, this run has True" in refused(use_rope_scaling=True)
    scaled = saved(tmp_path / "scaled", "llama scaled", vocab_size=64)
    assert f"{scaled} has rope_scaling_factor 4.0, this run has 8.0" in refused(
        finetune_from=str(scaled), rope_scaling_factor=8.0
    )
    (source / "model.safetensors").write_bytes(b"")
    assert f"cannot read {source}/model.safetensors: " in refused()
    change_config(source, hidden_act="relu")
    with pytest.raises(
        ValueError, match=r"^--finetune-from: .*config\.json: hidden_act: 'relu': not supported"
    ):
        config_from_values(values(data, tmp_path / "run", source))


def test_flags_override_shape_of_the_folder(tmp_path: Path) -> None:
    source = saved(tmp_path / "theirs", "qwen2 untied")
    needed = ["--seq-length", "8", "--train-iters", "1", "--lr", "1", "--data-path", "d"]
    model = parse_arguments(["--finetune-from", str(source), *needed]).model
    assert (model.hidden_size, model.num_query_groups, model.rotary_base, model.vocab_size) == (
        24,
        1,
        1e6,
        257,
    )
    assert (model.max_positions, model.untie_embeddings_and_output_weights, model.has_qkv_bias) == (
        16,
        True,
        True,
    )
    longer = parse_arguments(["--finetune-from", str(source), *needed, "--seq-length", "32"]).model
    assert longer.max_positions == 32, "rotary positions have no end"
    file = tmp_path / "run.yaml"
    file.write_text(f"finetune_from: {source}\nvocab_size: 300\n")
    model = parse_arguments(["--config", str(file), "--num-layers", "3", *needed]).model
    assert (model.hidden_size, model.vocab_size, model.num_layers) == (24, 300, 3)
    assert (
        parse_arguments(["--finetune-from", str(source), "--preset", "gpt2", *needed]).model.hidden_size
        == 768
    )
