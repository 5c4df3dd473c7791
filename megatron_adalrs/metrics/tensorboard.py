"""Writer of TensorBoard's event files.

torch's SummaryWriter is not used: it writes in a thread, and if that thread fails, as on a full disk, the
next scalars block forever.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_adalrs.utils.atomic_files import AtomicAppend


class EventFile:
    """A new event file of TensorBoard.

    Args:
        folder: Folder of the event files.
        first_step: TensorBoard drops the points after this step in earlier files.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self.name = f"TensorBoard's files in {folder}"
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{now}"
        self._file = AtomicAppend(folder / name)
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self.drop_after(first_step)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Write the scalars of one step by tag, or raise OSError and write none of them."""
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(Event(step=step, summary=summary))

    def drop_after(self, step: int) -> None:
        """Let TensorBoard drop the points after a step."""
        # The start of a session drops the points of its own step and later ones.
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
