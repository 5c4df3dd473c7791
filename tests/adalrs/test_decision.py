from __future__ import annotations

import pytest

from megatron_adalrs.adalrs.decision import Decision, InMemoryRun, apply_decision


def decision(**snapshots: str) -> Decision:
    return Decision(scale_before=1.0, scale_after=1.0, **snapshots)


def test_capture_precedes_restore() -> None:
    run = InMemoryRun(3)
    apply_decision(decision(capture="start"), run)
    assert run.state == 3
    run.state = 7
    apply_decision(decision(capture="end", restore="start"), run)
    assert run.state == 3
    apply_decision(decision(restore="end"), run)
    assert run.state == 7


def test_ordinary_step_changes_nothing() -> None:
    run = InMemoryRun(3)
    apply_decision(decision(), run)
    assert (run.state, run.snapshots) == (3, {})


def test_unknown_snapshot_cannot_be_restored() -> None:
    with pytest.raises(KeyError):
        apply_decision(decision(restore="start"), InMemoryRun(7))
