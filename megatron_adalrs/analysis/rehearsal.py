"""What it takes to drive a controller without a model: snapshots of any value, and lengths in other
proportions."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

from megatron_adalrs.adalrs.decision import Decision
from megatron_adalrs.adalrs.search_plan import RacePlan, SearchPlan
from megatron_adalrs.adalrs.settings import AdaLRSSettings

State = TypeVar("State")


def apply_decision(decision: Decision, state: State, snapshots: dict[str, State]) -> State:
    """The state (an immutable value) that a decision leaves behind; `snapshots` by name is brought up to
    date.

    Raises:
        KeyError: the decision goes back to a snapshot that was never taken or was released.
    """
    if decision.capture is not None:
        snapshots[decision.capture] = state
    if decision.restore is not None:
        state = snapshots[decision.restore]
    if decision.release is not None:
        del snapshots[decision.release]
    return state


def lengths_in_steps(settings: AdaLRSSettings, plan: SearchPlan | RacePlan) -> dict[str, int]:
    """The lengths that a user may set and has in this plan, by the name of the setting, in steps."""
    lengths = {}
    for field in fields(settings):
        value = getattr(plan, field.name, None)
        if field.default is None and isinstance(value, int) and not isinstance(value, bool):
            lengths[field.name] = value
    return lengths


def with_lengths(settings: AdaLRSSettings, plan: SearchPlan | RacePlan, factor: float) -> AdaLRSSettings:
    """The same search with every window, trial, return and restart `factor` times as long as in `plan`.

    Raises:
        ValueError: one of them becomes too short; the message names it.
    """
    lengths = lengths_in_steps(settings, plan)
    return replace(settings, **{name: max(1, round(factor * steps)) for name, steps in lengths.items()})
