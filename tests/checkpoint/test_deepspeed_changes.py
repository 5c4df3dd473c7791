"""Settings of --deepspeed-config that differ between a checkpoint and the run that resumes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.checkpoint import describe_resume, require_compatible
from megatron_adalrs.checkpoint.deepspeed_changes import deepspeed_changes
from megatron_adalrs.config import Config
from megatron_adalrs.distributed.process_mesh import ONE_PROCESS
from megatron_adalrs.engine.deepspeed_config import deepspeed_settings, settings_beside_flags
from tests.helpers.runs import tiny_config

CHECKPOINT = Path("run/iter_0000003")


def configured(folder: Path, **values: Any) -> Config:
    """Return a configuration with DeepSpeed settings by sections."""
    file = folder / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": values}))
    return tiny_config(zero_stage=2, deepspeed_config=file)


def state_of(config: Config) -> dict[str, Any]:
    return {
        "config": config.to_flat(),
        "world_size": 1,
        "progress": {"step": 3},
        "controller": {"mode": "fixed", "step": 3},
        "deepspeed": settings_beside_flags(deepspeed_settings(config, 1)),
    }


def test_a_changed_file_is_found_at_the_same_path(tmp_path: Path) -> None:
    state = state_of(configured(tmp_path, overlap_comm=True, contiguous_gradients=False))
    config = configured(tmp_path, overlap_comm=False)
    require_compatible(CHECKPOINT, state, config, ONE_PROCESS)
    assert deepspeed_changes(state, config, ONE_PROCESS) == {
        "deepspeed_config.zero_optimization.overlap_comm": (True, False),
        "deepspeed_config.zero_optimization.contiguous_gradients": (False, None),
    }
    assert describe_resume(CHECKPOINT, state, config, ONE_PROCESS).endswith(
        "changed since the checkpoint: deepspeed_config.zero_optimization.overlap_comm True -> False; "
        "deepspeed_config.zero_optimization.contiguous_gradients False -> unset"
    )


def test_the_same_settings_elsewhere_are_no_change(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    state = state_of(configured(tmp_path / "other", overlap_comm=True))
    assert deepspeed_changes(state, configured(tmp_path, overlap_comm=True), ONE_PROCESS) == {}


def test_flags_are_no_settings_of_the_file(tmp_path: Path) -> None:
    assert deepspeed_changes(state_of(tiny_config(clip_grad=2.0)), tiny_config(), ONE_PROCESS) == {}


@pytest.mark.parametrize(
    ("name", "default", "other"),
    [
        ("round_robin_gradients", False, True),
        ("sub_group_size", 1_000_000_000, 1000),
    ],
    ids=str,
)
def test_another_layout_of_the_files_is_refused(tmp_path: Path, name: str, default: Any, other: Any) -> None:
    with_default = configured(tmp_path, **{name: default})
    require_compatible(CHECKPOINT, state_of(configured(tmp_path)), with_default, ONE_PROCESS)
    for theirs, ours in ((default, other), (other, default)):
        state = state_of(configured(tmp_path, **{name: theirs}))
        with pytest.raises(ValueError) as caught:
            require_compatible(CHECKPOINT, state, configured(tmp_path, **{name: ours}), ONE_PROCESS)
        assert str(caught.value) == (
            f"--load: run/iter_0000003 has zero_optimization.{name} {theirs!r}, this run has {ours!r}: "
            f"DeepSpeed cannot load it with another value; set zero_optimization.{name} to {theirs!r} in "
            "--deepspeed-config"
        )


def test_another_loss_scaler_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"fp16": {"loss_scale_window": 500}}))
    state = state_of(tiny_config(fp16=True, deepspeed_config=file))
    with pytest.raises(ValueError, match=r"has fp16.loss_scale_window 500, this run has 1000: "):
        require_compatible(CHECKPOINT, state, tiny_config(fp16=True), ONE_PROCESS)
