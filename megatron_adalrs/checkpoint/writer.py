"""Write a run's checkpoints, either before training continues or in the background."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from megatron_adalrs.checkpoint.retention import CheckpointFolder
from megatron_adalrs.checkpoint.save import PendingSave
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine import Engine
from megatron_adalrs.utils.format import duration, quantity


class CheckpointWriteError(Exception):
    """A checkpoint could not be written in the background. Raised on every rank."""


class CheckpointWriter:
    """Writer of a run's checkpoints, one at a time. All methods are collective.

    Args:
        folder: Folder of the run's checkpoints.
        record: Takes the name of an event and its message.
    """

    def __init__(
        self, engine: Engine, mesh: ProcessMesh, folder: CheckpointFolder, record: Callable[[str, str], None]
    ) -> None:
        self._engine = engine
        self._mesh = mesh
        self._folder = folder
        self._record = record
        self._pending: PendingSave | None = None
        self._began = 0.0

    def save(self, step: int, content: dict[str, Any]) -> bool:
        """Write and publish a checkpoint.

        Returns:
            False if it could not be written. The failure is recorded; the previous checkpoints are untouched.

        Raises:
            CheckpointWriteError: The previous checkpoint could not be written in the background.
        """
        self.publish()
        try:
            self._start(step, content).publish()
        except ValueError as error:  # raised on all ranks alike; the run itself can continue
            self._record_failure(step, error)
            return False
        return True

    def begin(self, step: int, content: dict[str, Any]) -> bool:
        """Copy the content of a checkpoint and start to write it; `publish_when_written` publishes it.

        Returns:
            False if it could not be copied. The failure is recorded.

        Raises:
            CheckpointWriteError: As for `save`.
        """
        self.publish()
        self._began = time.monotonic()
        try:
            self._pending = self._start(step, content, in_background=True)
        except ValueError as error:
            self._record_failure(step, error)
            return False
        stall, copied = time.monotonic() - self._began, self._engine.files.copied_bytes
        self._record(
            "saving", f"checkpoint of step {step}: {quantity(copied, 'B')} per rank copied in {stall:.2f} s"
        )
        return True

    def publish_when_written(self) -> None:
        """Publish the pending checkpoint if all ranks have written it. Called after every step.

        Raises:
            CheckpointWriteError: As for `save`.
        """
        if self._pending is not None and self._pending.is_written:
            self.publish()

    def publish(self) -> None:
        """Wait for the pending checkpoint, if there is one, and publish it.

        Raises:
            CheckpointWriteError: As for `save`.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.publish()
        except ValueError as error:
            raise CheckpointWriteError(
                f"the checkpoint of step {pending.step} could not be written: {error}"
            ) from None
        elapsed = duration(time.monotonic() - self._began)
        self._record("saved", f"checkpoint of step {pending.step}: published after {elapsed}")

    def _start(self, step: int, content: dict[str, Any], in_background: bool = False) -> PendingSave:
        return PendingSave(self._engine, self._mesh, self._folder, step, content, in_background)

    def _record_failure(self, step: int, error: ValueError) -> None:
        self._record("save_failed", f"no checkpoint at step {step}: {error}")
