"""The table of what a changed field does on resume."""

from __future__ import annotations

from collections import Counter

from megatron_adalrs.cli.arguments import GROUPS, NESTED_FIELDS
from megatron_adalrs.config.on_resume import _FIELDS, ON_RESUME


def test_every_field_has_exactly_one_policy() -> None:
    plain = {name for group in GROUPS.values() for name in group.model_fields}
    nested = {f"{group}.{name}" for group, names in NESTED_FIELDS.items() for name in names}
    counts = Counter(name for names in _FIELDS.values() for name in names)
    assert set(ON_RESUME) == plain | nested
    assert set(counts.values()) == {1}
