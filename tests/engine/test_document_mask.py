"""Document masks on every mesh; the loss is the mean over the counted tokens of a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_adalrs.config import Config
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from tests.helpers.ranks import Ranks
from tests.helpers.runs import VOCABULARY, start

EOD = 3
STEPS = 5
MARKED = {
    "reset_attention_mask": True,
    "reset_position_ids": True,
    "eod_mask_loss": True,
    "eod_token_id": EOD,
    "lr": 2e-3,
    "micro_batch_size": 1,
    "global_batch_size": 8,
    "clip_grad": 1.1,
}
TENSOR, PIPE, CONTEXT = (
    f"{name}_size" for name in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel")
)
TWO_RANKS = [
    ("gpt2", {}),
    ("qwen2", {"zero_stage": 3, "recompute_granularity": "selective"}),
    ("qwen2", {TENSOR: 2, "sequence_parallel": True}),
    ("gpt2", {TENSOR: 2, "recompute_granularity": "full"}),
    ("gpt2", {CONTEXT: 2}),
    ("qwen2", {CONTEXT: 2, "zero_stage": 1}),
    ("gpt2", {PIPE: 2}),
    ("qwen2", {PIPE: 2, "zero_stage": 1, "recompute_granularity": "full"}),
]
FOUR_RANKS = [("qwen2", {PIPE: 2, TENSOR: 2, "sequence_parallel": True}), ("gpt2", {PIPE: 2})]


def batches(config: Config, mesh: ProcessMesh, step: int) -> list[np.ndarray]:
    """Return this rank's micro-batches of a step; the number of documents varies strongly between samples."""
    random = np.random.default_rng(step)
    size, length = config.global_batch_size(mesh.data.size), config.model.seq_length + 1
    samples = random.integers(EOD + 1, VOCABULARY, (size, length))
    samples[random.random((size, length)) < np.linspace(0, 0.6, size)[:, None]] = EOD
    return list(samples.reshape(-1, mesh.data.size, 1, length)[:, mesh.data.rank])


def train(values: dict[str, Any]) -> list[tuple[float, float]]:
    """Return losses and gradient norms, and the loss of a final evaluation."""
    config, mesh, engine = start(MARKED | values)
    results = [engine.train_batch(batches(config, mesh, step)) for step in range(STEPS)]
    evaluated = engine.evaluate(batches(config, mesh, step) for step in (100, 101))
    return [*((result.loss, result.grad_norm) for result in results), (evaluated, 0.0)]


@pytest.fixture(scope="module")
def alone(one_rank: Ranks) -> dict[str, list[tuple[float, float]]]:
    return {shape: one_rank.run(train, {"preset": f"{shape}-tiny"})[0] for shape in ("gpt2", "qwen2")}


def check(
    ranks: Ranks, alone: dict[str, list[tuple[float, float]]], shape: str, mesh: dict[str, Any]
) -> None:
    for result in ranks.run(train, mesh | {"preset": f"{shape}-tiny"}):
        np.testing.assert_allclose(result, alone[shape], atol=1e-5)


@pytest.mark.parametrize(("shape", "mesh"), TWO_RANKS, ids=str)
def test_two_ranks_have_the_losses_of_one(two_ranks: Ranks, alone, shape: str, mesh: dict[str, Any]) -> None:
    check(two_ranks, alone, shape, mesh)


@pytest.mark.parametrize(("shape", "mesh"), FOUR_RANKS, ids=str)
def test_four_ranks_have_the_losses_of_one(
    four_ranks: Ranks, alone, shape: str, mesh: dict[str, Any]
) -> None:
    check(four_ranks, alone, shape, mesh)


def test_loss_is_the_mean_over_counted_tokens(one_rank: Ranks) -> None:
    """Before the first step each counted token has a loss of about log(vocabulary)."""
    (results,) = one_rank.run(train, {"preset": "gpt2-tiny"})
    assert results[0][0] == pytest.approx(np.log(VOCABULARY), abs=0.1)
    assert results[-1][0] > 0.5 * results[0][0]


def train_without_targets(values: dict[str, Any]) -> tuple[Any, ...]:
    """Return the result of a step in which no target counts, an evaluation of it, and if weights changed."""
    config, mesh, engine = start(MARKED | values)
    engine.set_lr(1e-2)
    engine.train_batch(batches(config, mesh, 0))
    before = [weight.detach().clone() for weight in engine.module.parameters()]
    empty = [np.full_like(batch, EOD) for batch in batches(config, mesh, 1)]
    result = engine.train_batch(empty, accept=lambda loss, norm: True)
    same = all(
        bool((weight == kept).all()) for weight, kept in zip(engine.module.parameters(), before, strict=True)
    )
    after = engine.train_batch(batches(config, mesh, 2))
    return result.loss, result.applied, same, after.applied, after.loss, engine.evaluate(iter([empty]))


@pytest.mark.parametrize("values", [{"zero_stage": 1, "bf16": True}, {PIPE: 2}], ids=str)
def test_a_step_without_counted_targets_has_no_loss(two_ranks: Ranks, values: dict[str, Any]) -> None:
    for result in two_ranks.run(train_without_targets, {"preset": "gpt2-tiny"} | values):
        loss, applied, weights_are_the_same, applied_next, loss_next, evaluated = result
        assert (loss, applied, weights_are_the_same, applied_next) == (None, False, True, True)
        assert 0 < loss_next < 2 * np.log(VOCABULARY)
        assert np.isnan(evaluated)


def test_micro_batch_size_does_not_change_the_loss(one_rank: Ranks, alone) -> None:
    (result,) = one_rank.run(train_in_fours, {"preset": "gpt2-tiny", "micro_batch_size": 4})
    np.testing.assert_allclose(result, [loss for loss, _ in alone["gpt2"][:STEPS]], atol=1e-5)


def train_in_fours(values: dict[str, Any]) -> list[float]:
    config, mesh, engine = start(MARKED | values)
    losses = []
    for step in range(STEPS):
        samples = np.concatenate(batches(config, mesh, step))
        losses.append(engine.train_batch(list(samples.reshape(2, 4, -1))).loss)
    return losses
