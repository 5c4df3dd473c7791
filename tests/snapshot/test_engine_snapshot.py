"""After a backtrack, losses and weights equal, bit for bit, those of a run without the trial."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_adalrs.engine import Engine
from megatron_adalrs.snapshot.engine_snapshot import EngineSnapshot, estimate_snapshot_bytes
from tests.helpers import runs
from tests.helpers.ranks import Ranks
from tests.helpers.runs import micro_batches

FOLLOWING = 10
DROPOUT = {"preset": "qwen2-tiny", "hidden_dropout": 0.1, "attention_dropout": 0.1, "num_query_groups": 2}


def digest(engine: Engine) -> str:
    """Return a SHA-256 digest of the weights and of the tensors that the optimizer updates."""
    total = hashlib.sha256()
    tensors = dict(engine.training_state_tensors())
    for name, parameter in engine.module.named_parameters():
        tensors["weight", name] = parameter
        tensors["shard", name] = getattr(parameter, "ds_tensor", parameter)
    for name, tensor in sorted(tensors.items(), key=str):
        total.update(f"{name}".encode() + tensor.detach().float().numpy().tobytes())
    return total.hexdigest()


def run(values: dict[str, Any], start: int, trial_steps: int) -> dict[str, Any]:
    """Train `start` steps, optionally run and undo a trial at a very high rate, then train further steps."""
    config, mesh, engine = runs.start(values)
    for step in range(start):
        engine.train_batch(micro_batches(config, mesh, step))
    snapshot = EngineSnapshot(engine)
    if trial_steps:
        snapshot.capture()
        engine.set_lr(3.0)
        for step in range(start, start + trial_steps):
            engine.train_batch(micro_batches(config, mesh, step))
        snapshot.restore()
        engine.set_lr(config.optimizer.lr)
    steps = [
        engine.train_batch(micro_batches(config, mesh, step)) for step in range(start, start + FOLLOWING)
    ]
    return {
        "steps": [(result.loss, result.grad_norm) for result in steps],
        "digest": digest(engine),
        "bytes": snapshot.nbytes,
        "estimate": estimate_snapshot_bytes(config.training, engine.parameters_held, mesh.replica.size),
    }


def assert_bit_exact(ranks: Ranks, values: dict[str, Any], start: int = 3) -> None:
    """Check that an undone trial changes nothing and that the snapshot is as large as estimated."""
    untouched = ranks.run(run, values, start=start, trial_steps=0)
    undone = ranks.run(run, values, start=start, trial_steps=4)
    for rank in range(ranks.world_size):
        assert undone[rank]["steps"] == untouched[0]["steps"]
        assert undone[rank]["digest"] == untouched[rank]["digest"]
        if start:
            assert undone[rank]["bytes"] == pytest.approx(undone[rank]["estimate"], rel=0.05)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_backtracking_is_bit_exact(two_ranks: Ranks, zero_stage: int, bf16: bool) -> None:
    assert_bit_exact(two_ranks, DROPOUT | {"zero_stage": zero_stage, "bf16": bf16})


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_backtracking_is_bit_exact_on_tensor_ranks(two_ranks: Ranks, zero_stage: int, bf16: bool) -> None:
    values = {"zero_stage": zero_stage, "bf16": bf16, "tensor_model_parallel_size": 2, "micro_batch_size": 4}
    assert_bit_exact(two_ranks, DROPOUT | values)


@pytest.mark.parametrize(("zero_stage", "bf16"), [(0, False), (0, True), (1, False), (2, True), (3, True)])
def test_snapshot_before_the_first_step_is_bit_exact(two_ranks: Ranks, zero_stage: int, bf16: bool) -> None:
    assert_bit_exact(two_ranks, {"zero_stage": zero_stage, "bf16": bf16}, start=0)


PIPELINES = [
    {"pipeline_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "zero_stage": 1},
    {"pipeline_model_parallel_size": 2, "zero_stage": 1, "bf16": True},
]


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("cell", PIPELINES, ids=["zero0-fp32", "zero1-fp32", "zero1-bf16"])
def test_backtracking_a_pipeline_is_bit_exact(two_ranks: Ranks, cell: dict[str, Any], start: int) -> None:
    assert_bit_exact(two_ranks, DROPOUT | {"preset": "gpt2-tiny"} | cell, start)


@pytest.mark.parametrize(
    "cell",
    [
        {"sequence_parallel": True, "tensor_model_parallel_size": 2, "recompute_granularity": "full"},
        {"context_parallel_size": 2, "zero_stage": 1, "bf16": True},
        {"context_parallel_size": 2, "zero_stage": 3, "recompute_granularity": "selective"},
        {"pipeline_model_parallel_size": 2, "recompute_granularity": "full"},
    ],
    ids=str,
)
def test_backtracking_is_exact_with_split_sequences(two_ranks: Ranks, cell: dict[str, Any]) -> None:
    assert_bit_exact(two_ranks, DROPOUT | cell)


@pytest.mark.parametrize(
    "precision", [{"zero_stage": 0}, {"zero_stage": 1, "bf16": True, "sequence_parallel": True}], ids=str
)
def test_backtracking_is_exact_on_a_3d_mesh(eight_ranks: Ranks, precision: dict[str, Any]) -> None:
    mesh = {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2}
    assert_bit_exact(eight_ranks, DROPOUT | mesh | precision)


@pytest.mark.parametrize("cell", [{"zero_stage": 2, "bf16": True}, {"zero_stage": 3}], ids=str)
def test_backtracking_is_exact_with_offload(two_ranks: Ranks, tmp_path: Path, cell: dict[str, Any]) -> None:
    settings = tmp_path / "offload.json"
    settings.write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}')
    for start in (0, 3):
        assert_bit_exact(two_ranks, DROPOUT | cell | {"deepspeed_config": str(settings)}, start)


def scales(start: int) -> list[float]:
    """Return the engine's counters before a trial, after its overflows and after it was undone."""
    config, mesh, engine = runs.start({"fp16": True, "zero_stage": 1})
    snapshot = EngineSnapshot(engine)
    for step in range(start):
        engine.train_batch(micro_batches(config, mesh, step))
    snapshot.capture()
    found = [engine.counters()]
    untouched = [
        engine.train_batch(micro_batches(config, mesh, step)).loss for step in range(start, start + FOLLOWING)
    ]
    snapshot.restore()
    engine.set_lr(1e6)
    for step in range(start, start + 4):
        engine.train_batch(micro_batches(config, mesh, step))
    found.append(engine.counters())
    snapshot.restore()
    engine.set_lr(config.optimizer.lr)
    found.append(engine.counters())
    assert untouched == [
        engine.train_batch(micro_batches(config, mesh, step)).loss for step in range(start, start + FOLLOWING)
    ]
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 needs a GPU")
def test_fp16_loss_scale_is_restored() -> None:
    rank = Ranks(1, accelerator="cuda")
    ((before, overflowed, undone),) = rank.run(scales, 3)
    rank.close()
    assert undone == before != overflowed


def losses_of_a_diverged_run() -> tuple[list[float], list[float]]:
    config, mesh, engine = runs.start({})
    snapshot = EngineSnapshot(engine)
    engine.train_batch(micro_batches(config, mesh, 0))
    snapshot.capture()
    before = [engine.train_batch(micro_batches(config, mesh, step)).loss for step in range(1, 4)]
    snapshot.restore()
    engine.set_lr(float("nan"))
    engine.train_batch(micro_batches(config, mesh, 1))
    snapshot.restore()
    engine.set_lr(config.optimizer.lr)
    return before, [engine.train_batch(micro_batches(config, mesh, step)).loss for step in range(1, 4)]


def test_second_restore_replaces_nan_weights(two_ranks: Ranks) -> None:
    for before, after in two_ranks.run(losses_of_a_diverged_run):
        assert before == after
