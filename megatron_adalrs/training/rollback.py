"""Snapshots that a run can go back to, each with the progress of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megatron_adalrs.checkpoint.train_state import TrainState
from megatron_adalrs.engine import Engine
from megatron_adalrs.snapshot.engine_snapshot import EngineSnapshot
from megatron_adalrs.training.loss_guard import LossStatistics


@dataclass(frozen=True)
class RollbackPoint:
    """State of a run at a step, from which it continues as it did the first time."""

    snapshot: EngineSnapshot
    state: TrainState
    statistics: LossStatistics
    search: dict[str, Any] | None = None
    """State of the search, if a rollback to this point restores it. A search that rolls back to a snapshot of
    its own keeps its state."""


class RollbackStore:
    """Rollback points by name.

    Capturing a name again reuses its buffers, since their allocation is slow.

    Args:
        engine: Engine whose state is captured and restored.
        directory: Directory on a local disk for the snapshots; None for host memory.
    """

    def __init__(self, engine: Engine, directory: str | None = None) -> None:
        self._engine = engine
        self._directory = directory
        self._points: dict[str, RollbackPoint] = {}

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self._points)

    def state_at(self, name: str) -> TrainState | None:
        """Return the progress of the run at a point; None if there is no such point."""
        return self._points[name].state if name in self._points else None

    def capture(
        self, name: str, state: TrainState, statistics: LossStatistics, search: dict[str, Any] | None = None
    ) -> None:
        """Capture the current state of the engine. Collective.

        Args:
            name: Name of the point; an existing point is replaced.
            state: Progress of the run, which is copied.
            statistics: Statistics of the loss guard.
            search: State of the search, if a rollback to this point restores it.
        """
        point = self._points.get(name)
        snapshot = point.snapshot if point else EngineSnapshot(self._engine, self._directory)
        snapshot.capture()
        self._points[name] = RollbackPoint(snapshot, replace(state), statistics, search)

    def restore(self, name: str) -> RollbackPoint:
        """Restore the engine and return the point, whose other parts the caller restores. Collective."""
        point = self._points[name]
        point.snapshot.restore()
        return point

    def free(self, is_over: Callable[[str], bool]) -> None:
        """Free the points whose names meet a condition."""
        for name in [name for name in self._points if is_over(name)]:
            self._points.pop(name).snapshot.free()
