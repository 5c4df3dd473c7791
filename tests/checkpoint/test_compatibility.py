"""Requirements for resuming a checkpoint, on the same mesh and on another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.checkpoint import describe_resume, require_compatible
from megatron_adalrs.checkpoint.compatibility import SAVED_FIELDS, changes_since
from megatron_adalrs.config.on_resume import ON_RESUME, OnResume
from megatron_adalrs.distributed.process_mesh import ONE_PROCESS
from tests.helpers.runs import tiny_config

CHECKPOINT = Path("run/iter_0000003")


def state(world_size: int = 1, **values: Any) -> dict[str, Any]:
    return {"config": tiny_config(**values).to_flat(), "world_size": world_size, "progress": {"step": 3}}


def refusal(saved: dict[str, Any], **values: Any) -> str:
    with pytest.raises(ValueError, match=r"^--load: run/iter_0000003 ") as caught:
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


def test_changes_since_the_checkpoint_are_described() -> None:
    saved = state()
    described = describe_resume(CHECKPOINT, saved, tiny_config(lr=2e-2, weight_decay=0.2), ONE_PROCESS)
    assert described.endswith("\nchanged since the checkpoint: lr 0.01 -> 0.02; weight_decay 0.1 -> 0.2")
    saved["controller"] = {"scale": 3.0}
    assert describe_resume(CHECKPOINT, saved, tiny_config(lr=2e-2), ONE_PROCESS).endswith(
        "\nlr 0.02 overrides the rate that the search found, 0.03 (x 3)"
    )
    assert "overrides" not in describe_resume(CHECKPOINT, saved, tiny_config(), ONE_PROCESS)
    assert describe_resume(CHECKPOINT, state(), tiny_config(save_interval=5), ONE_PROCESS).endswith(
        "changed since the checkpoint: save_interval unset -> 5"
    )


@pytest.mark.parametrize("field", SAVED_FIELDS)
def test_missing_field_is_named(field: str) -> None:
    saved = state()
    del saved["config"][field]
    with pytest.raises(ValueError, match=f"--load: run/iter_0000003/state.json: config has no {field}"):
        require_compatible(CHECKPOINT, saved, tiny_config(), ONE_PROCESS)


def test_missing_progress_is_named() -> None:
    saved = state()
    del saved["progress"]
    with pytest.raises(ValueError, match=r"state\.json: progress is not valid"):
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
    assert "has bf16 True, this run has False: it must be the same; use --bf16" in refusal(state(bf16=True))
    assert refusal(state(), bf16=True).endswith("use --no-bf16")


@pytest.mark.parametrize("ranks", [1, 2])
def test_global_batch_size_must_be_the_same(ranks: int) -> None:
    assert (
        "has global_batch_size 8, this run has 4: it must be the same; use --global-batch-size 8"
        in refusal(state(ranks), global_batch_size=4)
    )
    # Where nobody said how large it is, the mesh decides.
    saved = state(ranks)
    del saved["config"]["global_batch_size"]
    assert f"has global_batch_size {2 * ranks}, this run has 8" in refusal(saved)


def test_micro_batch_size_may_differ() -> None:
    require_compatible(CHECKPOINT, state(micro_batch_size=4), tiny_config(), ONE_PROCESS)


def test_explicit_defaults_are_no_change() -> None:
    explicit = {
        "num_query_groups": 4,
        "kv_channels": 8,
        "ffn_hidden_size": 128,
        "max_position_embeddings": 16,
        "add_qkv_bias": True,
        "lr_decay_iters": 100,
        "lr_wsd_decay_style": "linear",  # has no effect without WSD
    }
    for saved, given in ((state(), explicit), (state(**explicit), {})):
        config = tiny_config(**given)
        assert changes_since(saved, config, ONE_PROCESS) == {}
        require_compatible(CHECKPOINT, saved, config, ONE_PROCESS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 3),
        ("seq_length", 8),
        ("seed", 7),
        ("init_method_std", 0.01),
        ("eod_mask_loss", True),
        ("adalrs", {"mode": "robust"}),
    ],
)
def test_field_that_must_be_the_same(field: str, value: object) -> None:
    assert f"has {field}" in refusal(state(), **{field: value, "train_iters": 1000, "lr_decay_iters": 100})


@pytest.mark.parametrize("field", [name for name, policy in ON_RESUME.items() if policy is OnResume.SEARCH])
def test_schedule_is_fixed_while_the_search_runs(field: str) -> None:
    searched = {"adalrs": {"mode": "robust"}, "train_iters": 1000, "lr_decay_style": "WSD"}
    values = {"lr": 1e-3, "min_lr": 1e-4, "lr_decay_style": "linear", "lr_wsd_decay_style": "linear"}
    changed = searched | {field: values.get(field, 900 if field != "lr_warmup_iters" else 50)}
    saved = state(**searched)
    for phase, is_running in (("control", True), ("done", False)):
        plan = {"search_end": 400, "train_iters": 1000}
        saved["controller"] = {
            "mode": "robust",
            "phase": phase,
            "plan": plan,
            "step": 3,
            "schedule_offset": 0,
        }
        saved["controller"]["settings"] = {"budget": "kept"}
        if is_running:
            message = refusal(saved, **changed)
            assert f" has {field} " in message
            assert "search is still running, until about step 400; use --" in message
        else:
            require_compatible(CHECKPOINT, saved, tiny_config(**changed), ONE_PROCESS)


def test_train_iters_below_the_step_are_refused() -> None:
    assert "is at step 3, and train_iters is 2: it must be" in refusal(state(), train_iters=2)
    require_compatible(CHECKPOINT, state(), tiny_config(train_iters=3), ONE_PROCESS)


def test_other_mesh_refuses_fp16() -> None:
    assert "the loss scale of fp16 cannot be transferred" in refusal(state(2, fp16=True), fp16=True)
    require_compatible(CHECKPOINT, state(1, fp16=True), tiny_config(fp16=True), ONE_PROCESS)


def test_other_mesh_refuses_offload(tmp_path: Path) -> None:
    overlay = tmp_path / "offload.json"
    overlay.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
    message = refusal(state(2, zero_stage=1), zero_stage=1, deepspeed_config=str(overlay))
    assert "optimizer state cannot be loaded into memory of offload_optimizer" in message
