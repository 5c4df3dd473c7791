"""Sinks that observe or interrupt a run; add them with `trainer.metrics.add`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from megatron_adalrs.metrics import Record
from megatron_adalrs.training.rollback import RollbackStore


class Interrupt:
    """Sends SIGTERM to this process in each step whose record meets a condition."""

    name = "interrupt"

    def __init__(self, condition: Callable[[Record], bool]) -> None:
        self._condition = condition

    def write(self, kind: str, record: Record) -> None:
        if kind == "train" and self._condition(record):
            os.kill(os.getpid(), signal.SIGTERM)

    def close(self) -> None:
        pass


class HeldSnapshots:
    """Counts the snapshots that are held at each record of a kind."""

    name = "held snapshots"

    def __init__(self, rollback: RollbackStore, kind: str) -> None:
        self.counts: list[int] = []
        self._rollback = rollback
        self._kind = kind

    def write(self, kind: str, record: Record) -> None:
        if kind == self._kind:
            self.counts.append(len(self._rollback))

    def close(self) -> None:
        pass


class TrialSteps:
    """Counts the completed steps of trials."""

    name = "trial steps"

    def __init__(self) -> None:
        self.count = 0

    def write(self, kind: str, record: Record) -> None:
        self.count += kind == "train" and record["phase"] == "trial"

    def close(self) -> None:
        pass
