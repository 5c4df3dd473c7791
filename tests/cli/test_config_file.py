"""Values of the configuration file: types, empty groups and paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_adalrs.cli.arguments import (
    NESTED_FIELDS,
    _all_fields,
    config_from_values,
    load_yaml,
    parse_arguments,
)
from megatron_adalrs.config.paths import change_paths

VALUES = {
    "preset": "gpt2-tiny",
    "seq_length": 32,
    "train_iters": 100,
    "lr": 1e-3,
    "data_path": "d",
}
LINE = "--preset gpt2-tiny --seq-length 32 --train-iters 100 --lr 1e-3"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", True),
        ("train_iters", True),
        ("zero_stage", True),
        ("run_dir", False),
        ("data_path", True),
        ("data_path", [True, "a", 1, "b"]),
        ("bf16", 1),
        ("bf16", "yes"),
        ("bf16", 0.0),
        ("adalrs", {"mode": "paper", "alpha": True}),
        ("loss_guard", {"policy": True}),
    ],
)
def test_true_and_false_are_no_other_values(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        config_from_values(VALUES | {name: value})


@pytest.mark.parametrize("group", ["adalrs", "loss_guard"])
def test_a_group_without_entries_is_empty(tmp_path: Path, group: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"{group}:\n#  window: 20\nlr: 1e-3\n")
    assert load_yaml(file) == {"lr": 1e-3}


def test_keys_given_twice_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lr: 1e-3\nlr: 1e-4\n")
    with pytest.raises(ValueError, match=r"cannot read .*c.yaml: key lr is given twice, in lines 1 and"):
        load_yaml(file)


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbflr: 1e-3\n")
    assert load_yaml(file) == {"lr": 1e-3}


def _fields_with_paths() -> set[str]:
    fields = _all_fields() | {
        name: field for group in NESTED_FIELDS.values() for name, field in group.items()
    }
    return {
        name for name, field in fields.items() if change_paths(name, field, ("x",), "y{}".format) != ("x",)
    }


def test_all_fields_with_paths_are_known() -> None:
    assert _fields_with_paths() == {
        *("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_cache_path"),
        *("tokenizer_model", "vocab_file", "merge_file", "deepspeed_config", "config", "run_dir", "save"),
        *("load", "finetune_from", "tensorboard_dir", "snapshot_dir"),
    }


def test_paths_of_flags_and_files_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/big")
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "c.yaml"
    file.write_text("train_data_path: [0.5, ~/a, 0.5, name=$DATA/b]\nsave: ${DATA}/s\n")
    config = parse_arguments(f"{LINE} --config=~/c.yaml --run-dir=~/run --valid-data-path $DATA/v".split())
    assert config.data.train_data_path == ("0.5", f"{tmp_path}/a", "0.5", "name=/big/b")
    assert config.data.valid_data_path == ("/big/v",)
    assert (config.run.save, config.run.run_dir) == (Path("/big/s"), tmp_path / "run")


def test_an_unknown_variable_names_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(ValueError, match=r"run_dir: \$NO_SUCH/r: the .* variable NO_SUCH is not set"):
        parse_arguments([*LINE.split(), "--data-path", "d", "--run-dir", "$NO_SUCH/r"])
