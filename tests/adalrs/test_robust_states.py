"""The transitions of robust mode: the table of the code, and the page that documents it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_adalrs.adalrs.decision import Event
from megatron_adalrs.adalrs.robust import TRANSITIONS, Condition, RobustController, State

PAGE = Path(__file__).parents[2] / "docs" / "adalrs_states.md"


def rows_of(heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading of the page, without its head."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_has_the_transitions_of_the_code() -> None:
    expected = [
        [
            state.value,
            condition.value,
            row.action,
            row.event.value if row.event else "none",
            "`, `".join(after.value for after in row.next),
        ]
        for (state, condition), row in TRANSITIONS.items()
    ]
    assert rows_of("Transitions") == expected


def test_the_page_has_all_states() -> None:
    assert [row[0] for row in rows_of("States")] == [state.value for state in State]


@pytest.mark.parametrize("state", State)
def test_every_state_but_before_can_be_reached(state: State) -> None:
    assert state is State.BEFORE or any(state in row.next for row in TRANSITIONS.values())


@pytest.mark.parametrize("state", State)
def test_every_state_but_done_can_be_left(state: State) -> None:
    leaves = any(before is state and set(row.next) != {state} for (before, _), row in TRANSITIONS.items())
    assert leaves == (state is not State.DONE)


def test_every_condition_and_action_is_in_the_table() -> None:
    assert {condition for _, condition in TRANSITIONS} == set(Condition)
    assert all(callable(getattr(RobustController, f"_{row.action}")) for row in TRANSITIONS.values())


def test_all_events_of_robust_mode_are_in_the_table() -> None:
    elsewhere = {Event.INITIAL_KEPT, Event.WINDOW, Event.NEUTRAL, Event.SCALED_DOWN}  # resume; paper mode
    assert {row.event for row in TRANSITIONS.values()} - {None} == set(Event) - elsewhere
