"""A run resumed on another mesh or ZeRO stage has the losses of an uninterrupted run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.checkpoint import (
    CheckpointFolder,
    read_state,
    require_compatible,
    resume,
    save_checkpoint,
)
from tests.helpers import runs
from tests.helpers.ranks import Ranks
from tests.helpers.settings import TINY_QWEN2

PIPE, TENSOR, CONTEXT = "pipeline_model_parallel_size", "tensor_model_parallel_size", "context_parallel_size"
BEFORE, AFTER = 3, 5
# Tied weights, shared key-value heads, biases on some projections, a padded vocabulary; clipping has an
# effect.
MODEL = TINY_QWEN2 | {"lr": 3e-3, "clip_grad": 0.5}
UNTIED = MODEL | {"preset": "gpt2-tiny", "num_query_groups": 4, "untie_embeddings_and_output_weights": True}
BF16 = {"bf16": True}
SOURCES: dict[str, dict[str, Any]] = {
    "zero0 dp2": {},
    "zero1 dp2": {"zero_stage": 1},
    "zero2 dp2 untied": UNTIED | {"zero_stage": 2},
    "zero3 dp2": {"zero_stage": 3},
    "tp2 zero1": {TENSOR: 2, "zero_stage": 1, "sequence_parallel": True},
    "pp2 zero0": {PIPE: 2},
    "pp2 zero1": {PIPE: 2, "zero_stage": 1},
    "bf16 zero0 dp2": BF16,
    "bf16 zero1 pp2": BF16 | {PIPE: 2, "zero_stage": 1},
}
TO_ONE = [
    ("zero1 dp2", {}),
    ("pp2 zero1", {}),
    ("pp2 zero0", {"zero_stage": 1}),
    ("zero2 dp2 untied", UNTIED),
    ("zero3 dp2", {"zero_stage": 2}),
    ("bf16 zero1 pp2", BF16),
]
TO_TWO = [
    ("zero0 dp2", {TENSOR: 2}),
    ("zero0 dp2", {"zero_stage": 3}),
    ("tp2 zero1", {"zero_stage": 2}),
    ("pp2 zero1", {TENSOR: 2, "zero_stage": 3}),
    ("zero3 dp2", {PIPE: 2, "zero_stage": 1}),
    ("zero1 dp2", {CONTEXT: 2}),
    ("zero2 dp2 untied", UNTIED | {PIPE: 2}),
    ("bf16 zero0 dp2", BF16 | {"zero_stage": 3}),
]


def save(values: dict[str, Any], folder: Path) -> tuple[str, list[float]]:
    """Save a checkpoint, and return it with the losses of the steps that follow."""
    config, mesh, engine = runs.start(MODEL | values)
    for step in range(BEFORE):
        engine.train_batch(runs.micro_batches(config, mesh, step))
    state = {
        "config": config.to_flat(),
        "progress": {"step": BEFORE},
        "identity": {"vocab_size": runs.VOCABULARY},
    }
    checkpoint = save_checkpoint(engine, mesh, CheckpointFolder(folder), BEFORE, state)
    steps = range(BEFORE, BEFORE + AFTER)
    return str(checkpoint), [
        engine.train_batch(runs.micro_batches(config, mesh, step)).loss for step in steps
    ]


def resume_and_train(values: dict[str, Any], checkpoint: str) -> tuple[list[float], int]:
    """Resume, and return the losses of the following steps and DeepSpeed's count of steps."""
    _, mesh, engine = runs.start(
        MODEL | values | {"seed": 7}
    )  # other weights, until the checkpoint is loaded
    config, state = runs.tiny_config(**(MODEL | values)), read_state(Path(checkpoint))
    require_compatible(Path(checkpoint), state, config, mesh)
    resume(engine, mesh, Path(checkpoint), state, config)
    engine.set_lr(config.optimizer.lr)
    steps = range(BEFORE, BEFORE + AFTER)
    losses = [engine.train_batch(runs.micro_batches(config, mesh, step)).loss for step in steps]
    return losses, engine.deepspeed.global_steps


@pytest.fixture(scope="module")
def saved(two_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[float]]]:
    """Return a checkpoint and the losses that follow it for each source."""
    folder = tmp_path_factory.mktemp("saved")
    return {name: two_ranks.run(save, values, folder / name)[0] for name, values in SOURCES.items()}


def assert_resumes(ranks: Ranks, saved: tuple[str, list[float]], values: dict[str, Any]) -> None:
    checkpoint, expected = saved
    # bf16 rounds activations to 1 in 256: sums in another order end elsewhere.
    tolerance = 5e-3 if values.get("bf16") else 1e-5
    for losses, steps in ranks.run(resume_and_train, values, checkpoint):
        assert losses == pytest.approx(expected, rel=tolerance)
        assert steps == BEFORE + AFTER


@pytest.mark.parametrize(("name", "values"), TO_ONE, ids=str)
def test_one_rank_resumes(one_rank: Ranks, saved: dict[str, Any], name: str, values: dict[str, Any]) -> None:
    assert_resumes(one_rank, saved[name], values)


@pytest.mark.parametrize(("name", "values"), TO_TWO, ids=str)
def test_two_ranks_resume(two_ranks: Ranks, saved: dict[str, Any], name: str, values: dict[str, Any]) -> None:
    assert_resumes(two_ranks, saved[name], values)


def test_checkpoint_of_one_rank_resumes_on_two(one_rank: Ranks, two_ranks: Ranks, tmp_path: Path) -> None:
    (saved,) = one_rank.run(save, {}, tmp_path)
    assert_resumes(two_ranks, saved, {"zero_stage": 3})


def refusal(values: dict[str, Any], checkpoint: str) -> str:
    try:
        resume_and_train(values, checkpoint)
    except ValueError as error:
        return str(error)
    return "accepted"


def overlay(folder: Path, **zero: Any) -> dict[str, Any]:
    file = folder / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    return {"deepspeed_config": str(file)}


@pytest.mark.parametrize(
    ("name", "value"), [("offload_optimizer", {"device": "cpu"}), ("round_robin_gradients", True)], ids=str
)
def test_unsupported_zero_settings_are_refused(
    one_rank: Ranks, two_ranks: Ranks, tmp_path: Path, name: str, value: Any
) -> None:
    (checkpoint, _), _ = two_ranks.run(save, {"zero_stage": 1} | overlay(tmp_path, **{name: value}), tmp_path)
    (message,) = one_rank.run(refusal, {}, checkpoint)
    assert message.startswith(f"--load: {checkpoint}/engine was written with zero_optimization.{name}")
