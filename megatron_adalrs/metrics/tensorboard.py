"""Records as TensorBoard's scalars.

Not through torch's SummaryWriter: it writes in a thread, and when that fails, as on a full disk, the next scalars wait
for it without an end.
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

from megatron_adalrs.metrics.sinks import Record
from megatron_adalrs.metrics.whole_writes import WholeWrites


class EventFile:
    """A new event file, as TensorBoard reads it.

    Args:
        first_step: what earlier files have of this step and later ones is undone, when it is not 0.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = (
            f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        )
        self._file = WholeWrites(folder / name)
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        if first_step:
            self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Scalars of one step by their tags. OSError: none of them is in the file."""
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(Event(step=step, summary=summary))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


class TensorBoard:
    """Scalars over kept steps. Points that may be undone wait for the verdict; a trial's are under `trial/` at once."""

    TRAIN = (
        "loss",
        "lr",
        "scale",
        "grad_norm",
        "tokens_per_second",
        "flops_per_second",
        "memory_bytes",
        "discarded_tokens",
    )
    EVAL = ("loss", "perplexity")
    CORPUS = ("samples", "tokens", "epochs")

    def __init__(self, folder: Path, log_interval: int, first_step: int) -> None:
        self.name = f"TensorBoard's files in {folder}"
        self._interval = log_interval
        self._events = EventFile(folder, first_step)
        self._pending: dict[str, list[Record]] = {"control": [], "trial": []}

    def write(self, kind: str, record: Record) -> None:
        if kind == "train" and record["step"] % self._interval == 0:
            phase = record["phase"]
            if phase not in ("control", "trial", "restart-control", "restart"):
                self._add_train(record)
            elif phase in self._pending:
                self._pending[phase].append(record)
            if phase in ("trial", "restart"):
                self._events.add({f"{phase}/loss": record["loss"]}, record["step"])
        elif kind == "eval":
            self._events.add({f"{record['split']}/{name}": record[name] for name in self.EVAL}, record["step"])
        elif kind == "corpora":
            for use in record["corpora"]:
                tags = {f"corpora/{use['name']}/{name}": use[name] for name in self.CORPUS}
                self._events.add(tags, record["step"])
        elif kind == "decision":
            self._add_decision(record)

    def close(self) -> None:
        self._events.close()

    def _add_train(self, record: Record) -> None:
        self._events.add({f"train/{name}": record[name] for name in self.TRAIN}, record["step"])

    def _add_decision(self, record: Record) -> None:
        if record["event"] == "bad_number_skipped":
            return  # nothing that waits is decided by it
        values = {"adalrs/scale": record["scale_after"]}
        if record["velocity"] is not None:
            values["adalrs/velocity"] = record["velocity"]
        self._events.add(values, record["total_steps"])
        event = record["event"]
        if event in ("accepted", "failed", "aborted", "neutral"):
            # Without backtracking a failed trial's steps stay too.
            trial_stays = event == "accepted" or not record["restore"]
            for kept in self._pending["trial" if trial_stays else "control"]:
                self._add_train(kept)
        if event != "trial_started":
            for pending in self._pending.values():
                pending.clear()
