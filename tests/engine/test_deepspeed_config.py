"""The user's DeepSpeed settings are merged with ours; a value that contradicts a flag is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.engine.deepspeed_config import deepspeed_settings
from megatron_adalrs.engine.deepspeed_sections import SECTIONS, UNSUPPORTED, Values
from tests.helpers.runs import tiny_config


def overlaid(tmp_path: Path, overlay: Any, **values: Any) -> dict[str, Any]:
    file = tmp_path / "ds.json"
    file.write_text(overlay if isinstance(overlay, str) else json.dumps(overlay))
    return deepspeed_settings(tiny_config(deepspeed_config=file, **values), 2)


def test_flags_alone() -> None:
    settings = deepspeed_settings(tiny_config(zero_stage=2, bf16=True, clip_grad=0.5), 2)
    assert settings["train_batch_size"] == 8
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["zero_optimization"] == {"stage": 2}
    assert (settings["bf16"], settings["gradient_clipping"]) == ({"enabled": True}, 0.5)


def test_an_overlay_adds_and_agrees(tmp_path: Path) -> None:
    zero = {"stage": 1, "overlap_comm": True}
    overlay = {"zero_optimization": zero, "train_batch_size": "auto", "comms_logger": {"enabled": True}}
    settings = overlaid(tmp_path, overlay, zero_stage=1)
    assert settings["zero_optimization"] == {"stage": 1, "overlap_comm": True}
    assert settings["train_batch_size"] == 8
    assert settings["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        (
            {"zero_optimization": {"stage": 3}},
            "zero_optimization.stage = 3 contradicts --zero-stage, which sets it to 0",
        ),
        ({"train_batch_size": 7}, "train_batch_size = 7 contradicts --global-batch-size, which sets it to 8"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device = 'cpu' requires --zero-stage 1 or higher, not 0",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param.device = 'cpu' requires --zero-stage 3 or higher, not 0",
        ),
        ({"fp16": {"enabled": True}}, "fp16.enabled = True contradicts --fp16, which sets it to False"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = True contradicts --bf16, which sets it to False"),
        ({"optimizer": {"type": "Adam"}}, "optimizer: set by flags (--lr"),
        ({"scheduler": {}}, "scheduler: set by flags (--lr-decay-style)"),
        ([1], "must contain a JSON object, not a list"),
        ("{", "cannot read"),
        ('{"zero_optimization": {"stage": 0, "stage": 1}}', "key 'stage' is given twice"),
    ],
)
def test_contradictions_name_both_sides(tmp_path: Path, overlay: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        overlaid(tmp_path, overlay)
    assert message in str(error.value)
    assert "ds.json" in str(error.value)


def test_a_search_needs_the_optimizer_in_memory(tmp_path: Path) -> None:
    overlay = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/scratch"}}}
    with pytest.raises(ValueError, match=r"device = 'nvme': snapshots copy .*--adalrs.mode off"):
        overlaid(tmp_path, overlay, zero_stage=3, adalrs={"mode": "paper", "window": 3})
    settings = overlaid(tmp_path, overlay, zero_stage=3)
    assert settings["zero_optimization"] == {"stage": 3} | overlay["zero_optimization"]


def test_loss_guard_needs_the_gradient_norm(tmp_path: Path) -> None:
    overlay = {"zero_optimization": {"compute_grad_norm": False}}
    with pytest.raises(
        ValueError, match=r"compute_grad_norm must not be False with loss_guard.policy 'skip'"
    ):
        overlaid(tmp_path, overlay, zero_stage=1, loss_guard={"policy": "skip"})
    assert not overlaid(tmp_path, overlay, zero_stage=1)["zero_optimization"]["compute_grad_norm"]


def test_offload_device_none_is_no_offloading(tmp_path: Path) -> None:
    overlay = {"zero_optimization": {"offload_optimizer": {"device": "none"}}}
    assert overlaid(tmp_path, overlay)["zero_optimization"] == {"stage": 0}


WRONG_VALUES: tuple[Any, ...] = (
    2,
    -1,
    0.5,
    True,
    None,
    "text",
    [],
    [1],
    {"unknown": 1},
    {"enabled": "text"},
    {"enabled": []},
)


def refusal(tmp_path: Path, overlay: dict[str, Any], **values: Any) -> str:
    with pytest.raises(ValueError) as error:
        overlaid(tmp_path, overlay, **values)
    return str(error.value)


@pytest.mark.parametrize("name", [*SECTIONS, *Values.model_fields])
def test_a_wrong_type_is_refused_by_name(tmp_path: Path, name: str) -> None:
    for value in WRONG_VALUES:
        try:
            overlaid(tmp_path, {name: value})
        except ValueError as error:
            assert f"ds.json: {name}" in str(error)
        else:
            assert name not in SECTIONS
            assert not isinstance(value, str | list | dict)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_wrong_type_in_a_section_is_refused(tmp_path: Path, section: str) -> None:
    wrong: tuple[Any, ...] = ({"unknown": {}}, [[]])
    for key, field in SECTIONS[section].model_fields.items():
        for value in wrong:
            assert f"ds.json: {section}" in refusal(tmp_path, {section: {field.alias or key: value}})


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_settings_are_refused(tmp_path: Path, name: str) -> None:
    section, _, key = name.rpartition(".")
    values: tuple[Any, ...] = (True, {"enabled": True})
    for value in values:
        overlay = {section: {key: value}} if section else {key: value}
        assert f"ds.json: {name}: {UNSUPPORTED[name]}" in refusal(tmp_path, overlay)


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"zero_optimization": 2}, "zero_optimization: must be a JSON object, not 2"),
        ({"bf16": True}, "bf16: must be a JSON object, not True"),
        ({"offload_optimizer": "cpu"}, "offload_optimizer: not a DeepSpeed setting that this program knows"),
        ({"zero_optimisation": {}}, "zero_optimisation: not .* did you mean 'zero_optimization'"),
        ({"zero_optimization": {"overlap_com": True}}, "overlap_com: not .* did you mean 'overlap_comm'"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "zero_optimization.offload_optimizer: 'cpu'"),
        ({"zero_optimization": {"overlap_comm": "yes"}}, "overlap_comm: 'yes': must be true or false"),
        ({"zero_optimization": {"reduce_bucket_size": True}}, "reduce_bucket_size: True: must be a number"),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown: 'yes': input should be a valid boolean"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, overlay: dict[str, Any], message: str) -> None:
    assert re.search(f"ds.json: .*{message}", f"{refusal(tmp_path, overlay)}")
