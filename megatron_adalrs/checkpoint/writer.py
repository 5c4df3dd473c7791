"""When a run's checkpoints are written and published: before training goes on, or beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from megatron_adalrs.checkpoint import CheckpointFolder, PendingSave
from megatron_adalrs.config import RunConfig
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine import Engine
from megatron_adalrs.utils.format import duration, quantity


class CheckpointWriteError(Exception):
    """What was being written beside the training could not be; raised on every rank."""


class CheckpointWriter:
    """At most one checkpoint is under way at a time. Every method is collective.

    Args:
        record: takes the name of an event and what to tell about it.
    """

    def __init__(
        self, engine: Engine, mesh: ProcessMesh, run: RunConfig, record: Callable[[str, str], None]
    ) -> None:
        self._engine, self._mesh, self._record = engine, mesh, record
        self._places = CheckpointFolder(run.save, run.keep_last, run.save_retain_interval)
        self._under_way: PendingSave | None = None
        self._began = 0.0

    def save(self, step: int, content: dict[str, Any]) -> bool:
        """Publish a checkpoint. False: it could not be written, which has been told; the previous ones are
        untouched.

        Raises:
            CheckpointWriteError: the one that was under way could not be written.
        """
        self.publish()
        try:
            PendingSave(self._engine, self._mesh, self._places, step, content).publish()
        except ValueError as error:  # raised on all ranks alike; the run itself is sound
            self._failed(step, error)
            return False
        return True

    def begin(self, step: int, content: dict[str, Any]) -> bool:
        """Copy what a checkpoint consists of and have it written; `publish_when_written` does the rest.

        Raises:
            CheckpointWriteError: as `save`.
        """
        self.publish()
        self._began = time.monotonic()
        try:
            self._under_way = PendingSave(
                self._engine, self._mesh, self._places, step, content, in_background=True
            )
        except ValueError as error:
            self._failed(step, error)
            return False
        stall, copied = time.monotonic() - self._began, self._engine.files.copied_bytes
        self._record(
            "saving", f"checkpoint of step {step}: {quantity(copied, 'B')} a rank copied in {stall:.2f} s"
        )
        return True

    def publish_when_written(self) -> None:
        """After every step. Raises CheckpointWriteError as `save`."""
        if self._under_way is not None and self._under_way.is_written:
            self.publish()

    def publish(self) -> None:
        """Publish what is under way, if anything, waiting for it. Raises CheckpointWriteError as `save`."""
        saving, self._under_way = self._under_way, None
        if saving is None:
            return
        try:
            saving.publish()
        except ValueError as error:
            raise CheckpointWriteError(
                f"the checkpoint of step {saving.step} could not be written: {error}"
            ) from None
        self._record(
            "saved", f"checkpoint of step {saving.step}: published after {duration(self._seconds())}"
        )

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def _failed(self, step: int, error: ValueError) -> None:
        self._record("save_failed", f"no checkpoint at step {step}: {error}")
