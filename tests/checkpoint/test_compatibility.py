"""Requirements for resuming a checkpoint, on the same mesh and on another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.checkpoint import describe_resume, require_compatible
from megatron_adalrs.checkpoint.compatibility import SAVED_FIELDS
from megatron_adalrs.distributed.process_mesh import ONE_PROCESS
from tests.helpers.runs import tiny_config

CHECKPOINT = Path("run/iter_0000003")


def state(world_size: int = 1, **values: Any) -> dict[str, Any]:
    return {"config": tiny_config(**values).to_flat(), "world_size": world_size, "progress": {"step": 3}}


def refusal(saved: dict[str, Any], **values: Any) -> str:
    with pytest.raises(ValueError, match=r"^--load: run/iter_0000003 was written") as caught:
        require_compatible(CHECKPOINT, saved, tiny_config(**values), ONE_PROCESS)
    return str(caught.value)


def test_other_mesh_and_zero_stage_are_described() -> None:
    saved = state(4, pipeline_model_parallel_size=2, zero_stage=1)
    config = tiny_config(zero_stage=3)
    require_compatible(CHECKPOINT, saved, config, ONE_PROCESS)
    assert describe_resume(CHECKPOINT, saved, config, ONE_PROCESS) == (
        "resumed on another mesh: from run/iter_0000003 at step 3, written with pipeline_model_parallel_size "
        "2, this "
        "run has 1; zero_stage 1, this run has 3; world_size 4, this run has 1; random number "
        "generators (dropout) are reseeded"
    )
    same = state(1, zero_stage=3)
    assert describe_resume(CHECKPOINT, same, config, ONE_PROCESS) == "resumed from run/iter_0000003 at step 3"


@pytest.mark.parametrize("field", SAVED_FIELDS)
def test_missing_field_is_named(field: str) -> None:
    saved = state()
    del saved["config"][field]
    with pytest.raises(ValueError, match=f"--load: run/iter_0000003/state.json: config has no {field}"):
        require_compatible(CHECKPOINT, saved, tiny_config(), ONE_PROCESS)


def test_rope_scaling_must_be_the_same() -> None:
    run = {"preset": "llama3.2-1b", "num_query_groups": 4, "ffn_hidden_size": 64}
    saved = state(**run, use_rope_scaling=False)
    require_compatible(CHECKPOINT, saved, tiny_config(**run, use_rope_scaling=False), ONE_PROCESS)
    with pytest.raises(ValueError, match="has use_rope_scaling False, this run has True"):
        require_compatible(CHECKPOINT, saved, tiny_config(**run), ONE_PROCESS)
    saved = state(**run)
    require_compatible(CHECKPOINT, saved, tiny_config(**run), ONE_PROCESS)
    with pytest.raises(ValueError, match=r"has rope_scaling_factor 32\.0, this run has 8\.0"):
        require_compatible(CHECKPOINT, saved, tiny_config(**run, rope_scaling_factor=8), ONE_PROCESS)


def test_rotary_position_limit_may_differ() -> None:
    saved = state(preset="qwen2.5-0.5b", num_query_groups=4)
    del saved["config"]["max_position_embeddings"]
    require_compatible(CHECKPOINT, saved, tiny_config(preset="qwen2.5-0.5b", num_query_groups=4), ONE_PROCESS)
    with pytest.raises(ValueError, match="has max_position_embeddings 32, this run has 64"):
        require_compatible(
            CHECKPOINT,
            state(max_position_embeddings=32),
            tiny_config(max_position_embeddings=64),
            ONE_PROCESS,
        )


def test_another_precision_is_refused() -> None:
    assert "with bf16 True, this run has False; use the same" in refusal(state(bf16=True))


def test_other_mesh_needs_same_global_batch_size() -> None:
    assert "its steps have 8 samples, those of this run 4; use --global-batch-size 8" in refusal(
        state(2), global_batch_size=4
    )
    # Where nobody said how large it is, the mesh decides.
    saved = state(2)
    del saved["config"]["global_batch_size"]
    assert "(world_size 2, this run has 1): its steps have 4 samples, those of this run 8" in refusal(saved)


def test_other_mesh_refuses_fp16() -> None:
    assert "the loss scale of fp16 cannot be transferred" in refusal(state(2, fp16=True), fp16=True)
    require_compatible(CHECKPOINT, state(1, fp16=True), tiny_config(fp16=True), ONE_PROCESS)


def test_other_mesh_refuses_offload(tmp_path: Path) -> None:
    overlay = tmp_path / "offload.json"
    overlay.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
    message = refusal(state(2, zero_stage=1), zero_stage=1, deepspeed_config=str(overlay))
    assert "optimizer state cannot be loaded into memory of offload_optimizer" in message
