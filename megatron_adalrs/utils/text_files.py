"""Reading of files that users write: a byte-order mark is dropped, and a key may be given only once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"


def read_text(path: Path) -> str:
    """Read a UTF-8 file without its byte-order mark."""
    return path.read_text(encoding="utf-8-sig")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON in which no object has the same key twice.

    Raises:
        ValueError: The text is not UTF-8 or not JSON, is nested too deeply, or has a key twice.
    """
    decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
    try:
        return json.loads(decoded, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def parse_yaml(text: str) -> Any:
    """Parse YAML in which no mapping has the same key twice; `-` and `_` are the same in keys.

    Raises:
        ValueError: The text is not YAML, is nested too deeply, has a key twice, or a number in base 8 or 60.
    """
    try:
        # A subclass of SafeLoader, which builds plain values only.
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key!r} is given twice: required once")
        values[key] = value
    return values


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses keys given twice, and numbers in the bases 8 and 60 of YAML 1.1."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping and check its keys as they are written, before `<<` adds those of others."""
        node = super().compose_mapping_node(anchor)
        first: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if key.tag == _MERGE or not isinstance(key, yaml.ScalarNode):
                continue
            name = key.value.replace("-", "_")
            if name in first:
                lines = f"{first[name].start_mark.line + 1} and {key.start_mark.line + 1}"
                names = " and ".join(dict.fromkeys((first[name].value, key.value)))
                raise yaml.YAMLError(f"key {names} is given twice, in lines {lines}: required once")
            first[name] = key
        return node

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        digits = node.value.lstrip("+-")
        is_octal = digits[:1] == "0" and digits[1:].replace("_", "").isdigit()
        if ":" in digits or (is_octal and digits.strip("0_")):
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}: YAML reads {node.value} in base {8 if is_octal else 60}: "
                "required a decimal number, or quotes"
            )
        is_integer = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if is_integer else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _StrictLoader.construct_number)
