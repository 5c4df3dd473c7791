"""Spellings of Megatron-LM that the argument parser accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_adalrs.cli.aliases import ALIASES, DERIVED, TOKENIZERS, rename_tokenizer
from megatron_adalrs.cli.arguments import GROUPS, parse_arguments
from megatron_adalrs.commands.pretrain import main as pretrain
from megatron_adalrs.config import Config

SHAPE = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --data-path d --lr 1e-3"
REQUIRED = f"{SHAPE} --seq-length 32 --train-iters 100"


def parse(line: str) -> Config:
    return parse_arguments(line.split())


def test_an_alias_sets_the_field_it_stands_for() -> None:
    config = parse(
        f"{SHAPE} --train-iters 100 --encoder-seq-length 32 --disable-bias-linear --layernorm-epsilon=1e-6"
        " --use-rotary-position-embeddings --recompute-activations --use-distributed-optimizer"
    )
    assert (config.model.seq_length, config.model.norm_epsilon) == (32, 1e-6)
    assert (config.model.add_bias_linear, config.model.position_embedding_type) == (False, "rope")
    assert (config.training.recompute_granularity, config.training.zero_stage) == ("selective", 1)


def test_every_alias_stands_for_a_field() -> None:
    fields = {name for group in GROUPS.values() for name in group.model_fields}
    for alias in ALIASES:
        assert alias.replacement.removeprefix("--").removeprefix("no-").replace("-", "_") in fields
        assert alias.flag.removeprefix("--").replace("-", "_") not in fields
    for derived in DERIVED:
        assert derived.flag.removeprefix("--").replace("-", "_") not in fields


def test_underscores_are_accepted_in_an_alias() -> None:
    assert not parse(f"{REQUIRED} --disable_bias_linear").model.add_bias_linear


def test_the_same_value_twice_is_no_conflict() -> None:
    line = f"{REQUIRED} --position-embedding-type rope --use-rotary-position-embeddings"
    assert parse(line).model.position_embedding_type == "rope"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--disable-bias-linear --add-bias-linear", "--disable-bias-linear: contradicts --add-bias-linear"),
        ("--disable-bias-linear=1", "--disable-bias-linear: takes no value"),
        ("--layernorm-epsilon 1e-6 --norm-epsilon 1e-5", "--layernorm-epsilon: contradicts --norm-epsilon"),
        (
            "--use-rotary-position-embeddings --position-embedding-type learned_absolute",
            "--use-rotary-position-embeddings: contradicts --position-embedding-type learned_absolute",
        ),
        ("--use-distributed-optimizer --zero-stage 3", "contradicts --zero-stage 3; give only one"),
        ("--group-query-attention", "--group-query-attention: requires --num-query-groups"),
        ("--finetune", "--finetune: requires --load"),
        ("--finetune --load a --finetune-from b", "--finetune: contradicts --finetune-from"),
        ("--lr-warmup-fraction 0.1 --lr-warmup-iters 3", "contradicts --lr-warmup-iters"),
        ("--lr-warmup-fraction 1.5", "--lr-warmup-fraction: 1.5: must be at least 0 and below 1"),
        ("--lr-warmup-fraction much", "--lr-warmup-fraction: 'much': must be a number"),
        ("--lr-warmup-fraction", "--lr-warmup-fraction: requires a value"),
        ("--train-samples 800 --global-batch-size 8", "--train-samples: contradicts --train-iters"),
    ],
)
def test_a_conflict_is_one_sentence(flags: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(f"{REQUIRED} {flags}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_conflict_ends_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain([*REQUIRED.split(), "--disable-bias-linear", "--add-bias-linear"]) == 2
    assert capsys.readouterr().err.startswith("error: --disable-bias-linear: contradicts")


def test_group_query_attention_needs_the_groups(tmp_path: Path) -> None:
    assert parse(f"{REQUIRED} --group-query-attention --num-query-groups 2").model.num_key_value_heads == 2
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"num_query_groups": 2}))
    config = parse(f"{REQUIRED} --group-query-attention --config {file}")
    assert config.model.num_key_value_heads == 2


def test_finetune_takes_the_weights_of_load(tmp_path: Path) -> None:
    config = parse(f"{REQUIRED} --load {tmp_path} --finetune")
    assert (config.run.load, config.run.finetune_from) == (None, tmp_path)


def test_samples_and_fraction_become_steps(tmp_path: Path) -> None:
    line = f"{SHAPE} --seq-length 32 --train-samples 807 --lr-warmup-fraction 0.15"
    config = parse(f"{line} --global-batch-size 8")
    assert (config.training.train_iters, config.optimizer.lr_warmup_iters) == (100, 15)
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"global_batch_size": 4, "lr_decay_iters": 50}))
    config = parse(f"{line} --config {file}")
    assert (config.training.train_iters, config.optimizer.lr_warmup_iters) == (201, 7)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--train-samples 800", "--train-samples: requires --global-batch-size"),
        (
            "--train-samples 7 --global-batch-size 8",
            "7 samples are less than one step of --global-batch-size 8",
        ),
    ],
)
def test_samples_that_are_no_steps(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(f"{SHAPE} --seq-length 32 {flags}")


def test_names_of_tokenizers() -> None:
    for theirs, ours in TOKENIZERS.items():
        assert parse(f"{REQUIRED} --tokenizer-type {theirs}").data.tokenizer_type == ours
        assert rename_tokenizer([f"--tokenizer_type={theirs}"]) == [f"--tokenizer_type={ours}"]
