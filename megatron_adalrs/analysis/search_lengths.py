"""Lengths of a search's windows, trials and races, and searches with other lengths."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from megatron_adalrs.adalrs.search_plan import RacePlan, SearchPlan
from megatron_adalrs.adalrs.settings import AdaLRSSettings


def lengths_in_steps(settings: AdaLRSSettings, plan: SearchPlan | RacePlan) -> dict[str, int]:
    """Return the lengths of a plan that a setting can change, in steps, by the name of the setting."""
    lengths = {}
    for field in fields(settings):
        value = getattr(plan, field.name, None)
        if field.default is None and isinstance(value, int) and not isinstance(value, bool):
            lengths[field.name] = value
    return lengths


def with_lengths(settings: AdaLRSSettings, plan: SearchPlan | RacePlan, factor: float) -> AdaLRSSettings:
    """Return the settings with every window, trial, return and restart `factor` times as long as in `plan`.

    Raises:
        ValueError: If a length becomes too short; the message names it.
    """
    lengths = lengths_in_steps(settings, plan)
    changes: dict[str, Any] = {name: max(1, round(factor * steps)) for name, steps in lengths.items()}
    return replace(settings, **changes)
