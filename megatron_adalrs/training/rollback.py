"""The points of a run that it can go back to."""

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
    """Everything that a run needs to go on from a step as it did the first time, but for its search."""

    snapshot: EngineSnapshot
    state: TrainState
    statistics: LossStatistics
    search: dict[str, Any] | None = None
    """The state of the search, where it goes back too; a search that goes back to a point knows it by
    itself."""


class RollbackStore:
    """Points by name. A point that is captured anew reuses its buffers: allocating them takes long.

    Args:
        directory: of a local disk to keep snapshots on, instead of in host memory.
    """

    def __init__(self, engine: Engine, directory: str | None = None) -> None:
        self._engine, self._directory = engine, directory
        self._points: dict[str, RollbackPoint] = {}

    def __len__(self) -> int:
        return len(self._points)

    def state_at(self, name: str) -> TrainState | None:
        """How far the run was at a point; None if there is no such point."""
        return self._points[name].state if name in self._points else None

    def capture(
        self, name: str, state: TrainState, statistics: LossStatistics, search: dict[str, Any] | None = None
    ) -> None:
        """Keep the engine as it is now. Collective."""
        point = self._points.get(name)
        snapshot = point.snapshot if point else EngineSnapshot(self._engine, self._directory)
        snapshot.capture()
        self._points[name] = RollbackPoint(snapshot, replace(state), statistics, search)

    def restore(self, name: str) -> RollbackPoint:
        """Take the engine back; the rest of the point is for the caller to go to. Collective."""
        point = self._points[name]
        point.snapshot.restore()
        return point

    def free(self, is_over: Callable[[str], bool]) -> None:
        """Give back the memory of the points that no one will go back to."""
        for name in [name for name in self._points if is_over(name)]:
            self._points.pop(name).snapshot.free()
