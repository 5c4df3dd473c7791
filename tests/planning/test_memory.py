"""Plans of meshes that need not exist, and their text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.config import Config
from megatron_adalrs.distributed.process_mesh import MeshShape
from megatron_adalrs.model.gpt import count_parameters
from megatron_adalrs.planning import RunPlan, describe, plan_run

VOCABULARY = 50257


def config(**values: Any) -> Config:
    defaults = {"preset": "gpt2", "train_iters": 1000, "lr": 1e-3, "data_path": "none"}
    return config_from_values(defaults | values)


def plan(shape: MeshShape, on_cpu: bool = False, **values: Any) -> RunPlan:
    sizes = {
        "pipeline_model_parallel_size": shape.pipe,
        "context_parallel_size": shape.context,
        "tensor_model_parallel_size": shape.tensor,
    }
    return plan_run(config(**sizes | values), VOCABULARY, shape, on_cpu)


def test_mixed_precision_takes_16_bytes_per_parameter() -> None:
    # Weights, gradients: 2 bytes each; masters and two moments: 4 each (arXiv 1910.02054, section 3.1).
    (rank,) = plan(MeshShape(), bf16=True, zero_stage=1).stages
    parameters = count_parameters(config().model, VOCABULARY)
    assert rank.part.parameters == parameters
    assert (rank.weights, rank.optimizer) == (2 * parameters, 12 * parameters)
    assert rank.peak > 16 * parameters


def test_zero_shards_optimizer_and_stage_3_weights() -> None:
    def rank(stage: int) -> Any:
        return plan(MeshShape(data=4, context=2), bf16=True, zero_stage=stage, global_batch_size=8).stages[0]

    assert rank(1).optimizer == rank(3).optimizer == pytest.approx(rank(0).optimizer / 8, rel=1e-6)
    assert rank(2).weights == rank(1).weights > 7 * rank(3).weights
    # What stage 1 accumulates is whole.
    assert rank(1).gradients == 2 * rank(1).part.parameters
    assert rank(2).gradients == pytest.approx(6 / 8 * rank(2).part.parameters, rel=1e-6)


def test_tied_embedding_counts_on_both_end_stages() -> None:
    first, last = plan(MeshShape(pipe=2)).stages
    table = config().model.padded_vocab_size(VOCABULARY) * 768
    assert (
        first.part.parameters + last.part.parameters == count_parameters(config().model, VOCABULARY) + table
    )


def test_tensor_ranks_shard_the_padded_vocabulary() -> None:
    (rank,) = plan(MeshShape(tensor=4)).stages
    assert max(rank.part.sizes) == config().model.padded_vocab_size(VOCABULARY, 4) // 4 * 768


def test_early_stages_hold_more_micro_batches() -> None:
    stages = plan(MeshShape(pipe=4), pipeline_partition="uniform", global_batch_size=8).stages
    activations = [stage.activations / stage.part.blocks for stage in stages[:3]]
    assert activations == sorted(activations, reverse=True)
    assert activations[0] > 1.5 * activations[2]


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputed_activations_are_not_held(granularity: str) -> None:
    shape = {"preset": "qwen2.5-0.5b", "seq_length": 2048}
    kept, recomputed = (
        plan(MeshShape(), **shape, recompute_granularity=how).stages[0].activations
        for how in (None, granularity)
    )
    assert recomputed < (0.5 if granularity == "full" else 0.95) * kept


def test_splitting_sequences_splits_activations() -> None:
    whole, parts = (plan(MeshShape(context=size)).stages[0].activations for size in (1, 4))
    assert parts < 0.45 * whole  # the gradient of the tied embedding stays
    with_copies, without = (
        plan(MeshShape(tensor=4), sequence_parallel=split).stages[0].activations for split in (False, True)
    )
    assert without < 0.85 * with_copies


def test_offloaded_state_is_on_the_host(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
    here, offloaded = (
        plan(MeshShape(data=2), bf16=True, zero_stage=2, deepspeed_config=path).stages[0]
        for path in (None, file)
    )
    assert (here.offloaded, offloaded.offloaded > offloaded.optimizer) == (0, True)
    assert offloaded.peak <= here.peak - here.optimizer


def test_default_reduce_bucket_is_at_most_the_model(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000}}))
    small, large = (
        plan(MeshShape(data=2), zero_stage=1, deepspeed_config=path).stages[0].buffers
        for path in (file, None)
    )
    assert small == 4000
    assert large == 4 * count_parameters(config().model, VOCABULARY)


def test_snapshots_count_with_search_or_rewind() -> None:
    def snapshots(**values: Any) -> int:
        return plan(MeshShape(), **values).stages[0].snapshot

    one = snapshots(adalrs={"mode": "paper"})
    assert snapshots() == snapshots(loss_guard={"policy": "skip"}) == 0 < one
    assert snapshots(loss_guard={"policy": "rewind"}) == one
    assert snapshots(loss_guard={"policy": "rewind"}, adalrs={"mode": "robust"}) == 5 * one
    assert "; snapshots 1.49 GB on the host" in describe(plan(MeshShape(), loss_guard={"policy": "rewind"}))


def test_large_world_has_one_row_per_stage() -> None:
    text = describe(plan(MeshShape(pipe=2, data=128, tensor=4), global_batch_size=1024))
    assert "0-511" in text and "512-1023" in text and "0-127" in text
    assert "1024 samples = 128 replica(s) x 8 micro-batch(es) of 1, 1048576 tokens" in text
    assert "pipeline bubble 1/(8 + 1) = 11.1%" in text
    assert "Not counted" in text
    assert max(map(len, text.splitlines())) <= 120


def test_small_world_has_one_row_per_rank() -> None:
    lines = describe(plan(MeshShape(pipe=2, tensor=2))).splitlines()
    rows = [line.split()[:3] for line in lines[1:5]]
    assert lines[0].split()[:3] == ["rank", "stage", "shard"]
    assert rows == [["0", "0", "0"], ["1", "0", "1"], ["2", "1", "0"], ["3", "1", "1"]]


def test_single_rank_has_one_line() -> None:
    memory, step = describe(plan(MeshShape())).splitlines()
    assert memory.startswith("memory, estimated for accelerators: at most ")
    assert step == "a step: 1 samples = 1 replica(s) x 1 micro-batch(es) of 1, 1024 tokens"


def test_a_batch_that_does_not_fit_the_mesh_is_refused() -> None:
    with pytest.raises(ValueError, match=r"global_batch_size: 6 is not a multiple of .*\(4\) = 4"):
        plan(MeshShape(data=4), global_batch_size=6)
