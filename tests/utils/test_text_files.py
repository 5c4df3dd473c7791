"""Files that users write: keys given twice, byte-order marks and numbers in other bases."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_adalrs.utils.text_files import parse_json, parse_yaml, read_text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\nseed: 2\nlr: 3\n", "key lr is given twice, in lines 1 and 3"),
        ("a-b: 1\na_b: 2\n", "key a-b and a_b is given twice, in lines 1 and 2"),
        ("adalrs:\n  window: 1\n  window: 2\n", "key window is given twice, in lines 2 and 3"),
        ("{lr: 1, 'lr': 2}", "key lr is given twice"),
        ("train_iters: 010\n", "line 1: YAML reads 010 in base 8"),
        ("lr: 1:30\n", "line 1: YAML reads 1:30 in base 60"),
        ("lr: 1:30.5\n", "base 60"),
        ("a: [\n", "while parsing"),
        ("[" * 1200, "nested too deeply"),
    ],
)
def test_ambiguous_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_yaml(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_plain_yaml_is_read_as_before() -> None:
    text = "base: &b {lr: 1}\nrun: {<<: *b, lr: 2}\nx: 0\ny: -0.5\nz: 1e-3\nl: [1, 2]\nn: 1_000\n"
    assert parse_yaml(text) == {
        "base": {"lr": 1},
        "run": {"lr": 2},
        "x": 0,
        "y": -0.5,
        "z": "1e-3",
        "l": [1, 2],
        "n": 1000,
    }


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"b": {"a": 1, "a": 1}}', b'[{"a": 1, "a": 2}]'])
def test_keys_given_twice_in_json_are_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="key 'a' is given twice"):
        parse_json(text)


def test_deeply_nested_json_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_byte_order_marks_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"\xef\xbb\xbf{}")
    assert read_text(file) == "{}"
    assert parse_json(file.read_bytes()) == parse_json("\ufeff{}") == {}


def test_keys_of_a_merged_mapping_are_overridden() -> None:
    text = "base: &b {x: 1, y: 2}\nouter: {inner: &i {<<: *b, x: 3}}\nused: {<<: *i, y: 4}\n"
    assert parse_yaml(text)["used"] == {"x": 3, "y": 4}
