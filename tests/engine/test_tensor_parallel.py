"""Tensor and sequence parallelism give the results of one rank, and resume from checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_adalrs.checkpoint import CheckpointFolder, load_checkpoint, save_checkpoint
from megatron_adalrs.distributed.process_mesh import MeshAxis
from megatron_adalrs.engine import build_engine
from megatron_adalrs.model.gpt import GPT
from megatron_adalrs.model.initialization import init_weights
from megatron_adalrs.parallel import cross_entropy
from megatron_adalrs.parallel.cross_entropy import linear_cross_entropy
from megatron_adalrs.parallel.layers import shard_of
from megatron_adalrs.parallel.layout import Layout
from megatron_adalrs.parallel.mappings import (
    copy,
    gather,
    gather_sequence,
    reduce,
    reduce_scatter_sequence,
    scatter,
)
from megatron_adalrs.parallel.random import dropout, rank_local_rng
from megatron_adalrs.snapshot.rng_state import seed_everything
from tests.helpers.ranks import Ranks
from tests.helpers.runs import VOCABULARY, mesh_of, micro_batches, start, tiny_config

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"preset": "gpt2-tiny"},
    "qwen2": {"preset": "qwen2-tiny", "num_query_groups": 2},
    "untied": {"preset": "llama-tiny", "num_query_groups": 4, "untie_embeddings_and_output_weights": True},
}
TWO = {"tensor_model_parallel_size": 2}


def norms(values: dict[str, Any]) -> list[float]:
    config, mesh, engine = start(values)
    return [engine.train_batch(micro_batches(config, mesh, step)).grad_norm for step in range(5)]


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_bf16_norm_counts_each_parameter_once(one_rank: Ranks, two_ranks: Ranks, zero_stage: int) -> None:
    # Leaving out the other rank's shards, as DeepSpeed does for unmarked gradients, would make it a third
    # smaller.
    values = FAMILIES["gpt2"] | {"lr": 1e-3, "clip_grad": 0.5, "zero_stage": zero_stage}
    (expected,) = one_rank.run(norms, values)
    results = two_ranks.run(norms, values | TWO | {"bf16": True})
    assert results[0] == results[1] == pytest.approx(expected, rel=0.1)


def differing_weights(family: str) -> list[str]:
    """Return names of the parameters that differ from this rank's part of a whole model's."""
    config = tiny_config(**FAMILIES[family] | TWO)
    model = GPT(config.model, VOCABULARY, Layout(tensor=mesh_of(config).tensor))
    init_weights(model, config.model, seed=7)
    whole = GPT(config.model, VOCABULARY)
    init_weights(whole, config.model, seed=7)
    expected = dict(whole.named_parameters())
    differing = []
    for name, parameter in model.named_parameters():
        part, shard = expected[name], shard_of(parameter)
        if name in ("embedding.tokens.weight", "output.weight"):
            part = F.pad(part, (0, 0, 0, sum(shard.blocks) - part.shape[0]))
        if not torch.equal(parameter, shard.of(part) if shard else part):
            differing.append(name)
    return differing


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mesh_starts_from_the_same_whole_weights(two_ranks: Ranks, family: str) -> None:
    assert two_ranks.run(differing_weights, family) == [[], []]


def loss_and_gradients(tokens: int, vocabulary: int, rows: int, chunk: int) -> dict[str, list[float]]:
    """Return the largest errors of the vocabulary-parallel loss and its gradients against torch's."""
    axis = mesh_of(tiny_config(**TWO)).tensor
    generator = torch.Generator().manual_seed(vocabulary)
    whole = torch.randn(rows * axis.size, 8, generator=generator)
    hidden = torch.randn(tokens, 8, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    weight = whole.chunk(axis.size)[axis.rank].clone().requires_grad_()
    default, cross_entropy.CHUNK_ELEMENTS = cross_entropy.CHUNK_ELEMENTS, chunk
    loss = linear_cross_entropy(copy(hidden, axis), weight, targets, vocabulary, axis)
    cross_entropy.CHUNK_ELEMENTS = default
    (3.0 * loss).backward()

    reference_hidden, reference_weight = (
        hidden.detach().clone().requires_grad_(),
        whole.clone().requires_grad_(),
    )
    reference = F.cross_entropy(reference_hidden @ reference_weight[:vocabulary].t(), targets)
    (3.0 * reference).backward()
    pairs = {
        "loss": (loss, reference),
        "hidden": (hidden.grad, reference_hidden.grad),
        "weight": (weight.grad, reference_weight.grad.chunk(axis.size)[axis.rank]),
    }
    return {name: float((a - b).detach().abs().max()) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("chunk", [64, 1 << 22], ids=["chunks", "one chunk"])
@pytest.mark.parametrize(("vocabulary", "rows"), [(1, 1), (13, 7), (16, 8), (33, 32), (29, 64), (101, 64)])
def test_vocabulary_parallel_cross_entropy_is_torchs(
    two_ranks: Ranks, vocabulary: int, rows: int, chunk: int
) -> None:
    for deviations in two_ranks.run(loss_and_gradients, 11, vocabulary, rows, chunk):
        assert max(deviations.values()) < 2e-6, deviations


def mapped() -> dict[str, Any]:
    """Return result and gradient of each mapping; rank r has (r + 1) times 0..7, [1, 4, 2] or its part."""
    axis = mesh_of(tiny_config(**TWO)).tensor
    whole, part = torch.arange(8.0).view(1, 4, 2), torch.arange(4.0).view(1, 2, 2)
    functions = {
        "copy": (lambda x: copy(x, axis), whole),
        "reduce": (lambda x: reduce(x, axis), whole),
        "scatter": (lambda x: scatter(x, axis, 1), whole),
        "gather": (lambda x: gather(x, axis, -1), part),
        "gather_sequence": (lambda x: gather_sequence(x, axis), part),
        "reduce_scatter_sequence": (lambda x: reduce_scatter_sequence(x, axis), whole),
    }
    results = {}
    for name, (function, values) in functions.items():
        x = (values * (axis.rank + 1)).requires_grad_()
        y = function(x)
        y.backward(torch.arange(float(y.numel())).view(y.shape) * (axis.rank + 1))
        results[name] = y.detach().numpy(), x.grad.numpy()
    return results


def test_mappings_pair_forward_with_backward(two_ranks: Ranks) -> None:
    whole, part = np.arange(8.0).reshape(1, 4, 2), np.arange(4.0).reshape(1, 2, 2)
    for rank, results in enumerate(two_ranks.run(mapped)):
        mine, rows = rank + 1, slice(2 * rank, 2 * rank + 2)
        joined = np.arange(8.0).reshape(1, 2, 4)
        expected = {
            "copy": (whole * mine, whole * 3),
            "reduce": (whole * 3, whole * mine),
            "scatter": (whole[:, rows] * mine, np.concatenate([part, 2 * part], 1)),
            "gather": (np.concatenate([part, 2 * part], 2), joined[..., rows] * mine),
            "gather_sequence": (np.concatenate([part, 2 * part], 1), whole[:, rows] * 3),
            "reduce_scatter_sequence": (whole[:, rows] * 3, np.concatenate([part, 2 * part], 1)),
        }
        for name, (forward, backward) in expected.items():
            np.testing.assert_array_equal(results[name][0], forward, err_msg=name)
            np.testing.assert_array_equal(results[name][1], backward, err_msg=name)


def dropped() -> tuple[list[float], list[float], list[float]]:
    axis = mesh_of(tiny_config(**TWO)).tensor
    seed_everything(5, 0)
    shared = dropout(torch.ones(64), 0.5, True, MeshAxis())
    own = dropout(torch.ones(64), 0.5, True, axis)
    with rank_local_rng(axis):
        torch.rand(1000 * (axis.rank + 1))
    return shared.tolist(), own.tolist(), torch.rand(4).tolist()


def test_dropout_is_shared_only_on_copies(two_ranks: Ranks) -> None:
    (shared, own, after), (shared_2, own_2, after_2) = two_ranks.run(dropped)
    assert shared == shared_2
    assert own != own_2
    assert after == after_2


def resume(folder: Path, values: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return losses after a checkpoint, of the run that wrote it and of one that loads it."""
    config, mesh, first = start(values)
    for step in range(3):
        first.train_batch(micro_batches(config, mesh, step))
    checkpoint = save_checkpoint(first, mesh, CheckpointFolder(folder), 3, {"config": config.to_flat()})
    expected = [first.train_batch(micro_batches(config, mesh, step)).loss for step in range(3, 7)]
    seed_everything(99, mesh.tensor_group)
    second = build_engine(config, VOCABULARY, mesh)
    load_checkpoint(second, mesh, checkpoint)
    return expected, [second.train_batch(micro_batches(config, mesh, step)).loss for step in range(3, 7)]


@pytest.mark.parametrize(("zero_stage", "bf16"), [(0, True), (1, True), (3, False)])
def test_tensor_parallel_checkpoint_resumes_exactly(
    two_ranks: Ranks, tmp_path: Path, zero_stage: int, bf16: bool
) -> None:
    values = {
        "vocab_size": VOCABULARY,
        "zero_stage": zero_stage,
        "bf16": bf16,
        "tensor_model_parallel_size": 2,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    }
    for expected, resumed in two_ranks.run(resume, tmp_path, values):
        assert resumed == expected
