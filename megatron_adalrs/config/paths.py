"""The paths in the fields of the configuration: which there are, and how they are changed."""

from __future__ import annotations

import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from megatron_adalrs.config.corpora import Entries, change_prefixes

PATHS_AS_TEXT = frozenset({"snapshot_dir"})
"""Fields with a path whose type is a string."""


def change_paths(name: str, field: FieldInfo, value: Any, change: Callable[[str], str]) -> Any:
    """Return a field's value with `change` applied to each path in it.

    Args:
        name: Name of the field, without its group.
        field: The field.
        value: A value of the field's type.
        change: Returns a path for a path.
    """
    if value is None:
        return None
    kinds = {field.annotation, *typing.get_args(field.annotation)}
    if Path in kinds:
        return Path(change(str(value)))
    if name in PATHS_AS_TEXT:
        return change(str(value))
    if Entries in kinds:
        return change_prefixes(value, change)
    return value
