"""Sink that turns records into the scalars of a dashboard, such as TensorBoard.

`metrics/__init__.py` says how to add a metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from megatron_adalrs.metrics.kept_steps import LOSS_GUARD
from megatron_adalrs.metrics.sinks import Record


class Target(Protocol):
    """Dashboard that scalars are written to."""

    name: str
    """Name in warnings."""

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Write the scalars of one step by tag, or raise OSError and write none of them."""

    def drop_after(self, step: int) -> None:
        """Remove the points after a step, where the dashboard can: the run has gone back to this step."""

    def close(self) -> None:
        """Write everything that is still pending."""


class Scalars:
    """Sink of scalars. The steps of all tags are kept steps; `train/executed_steps` counts all.

    Steps that may be undone are held back until the verdict. The loss of a trial is also written at once,
    under `trial/`, and that of a restart under `restart/`.

    Args:
        target: Dashboard.
        log_interval: Steps between points of the training loss.
        first_step: Kept steps when the process begins. The use of the corpora at that step is not written:
            it is the same as before.
    """

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
    SEARCH = ("velocity", "gain")

    def __init__(self, target: Target, log_interval: int, first_step: int = 0) -> None:
        self.name = target.name
        self._interval, self._target = log_interval, target
        self._first_step = self._last_step = first_step
        self._pending: dict[str, list[Record]] = {"control": [], "trial": [], "restart": []}

    def write(self, kind: str, record: Record) -> None:
        if kind == "train" and record["step"] % self._interval == 0:
            phase = record["phase"]
            if phase not in ("control", "trial", "restart-control", "restart"):
                self._add_train(record)
            elif phase in self._pending:
                self._pending[phase].append(record)
            if phase in ("trial", "restart") and record["loss"] is not None:
                self._target.add({f"{phase}/loss": record["loss"]}, record["step"])
        elif kind == "eval":
            self._target.add(
                {f"{record['split']}/{name}": record[name] for name in self.EVAL}, record["step"]
            )
        elif kind == "corpora" and record["step"] != self._first_step:
            for use in record["corpora"]:
                tags = {f"corpora/{use['name']}/{name}": use[name] for name in self.CORPUS}
                self._target.add(tags, record["step"])
        elif kind == "decision":
            self._add_decision(record)

    def close(self) -> None:
        self._target.close()

    def _add_train(self, record: Record) -> None:
        values = {f"train/{name}": record[name] for name in self.TRAIN if record[name] is not None}
        self._target.add(values | {"train/executed_steps": record["total_steps"]}, record["step"])
        self._last_step = record["step"]

    def _add_decision(self, record: Record) -> None:
        event = record["event"]
        if event == "loss_guard_skipped":
            return  # a skipped batch decides nothing about the steps that are held back
        if event.startswith(LOSS_GUARD):
            self._go_back(record["step"])
        if event == "accepted" and self._pending["restart"]:
            self._go_back(0)  # all steps are those of the new run
        if event in ("accepted", "failed", "aborted", "neutral"):
            for kept in self._kept(record):
                if kept["step"] <= record["step"]:
                    self._add_train(kept)
        if event != "trial_started":
            for pending in self._pending.values():
                pending.clear()
        values = {f"adalrs/{name}": record[name] for name in self.SEARCH if record[name] is not None}
        self._target.add({"adalrs/scale": record["scale_after"]} | values, record["step"])

    def _kept(self, record: Record) -> list[Record]:
        """Return the steps that a verdict adds to the run."""
        # Without backtracking the steps of a failed trial are kept too.
        if record["event"] != "accepted" and record["restore"]:
            return self._pending["control"]
        return self._pending["restart"] or self._pending["trial"]

    def _go_back(self, step: int) -> None:
        if step < self._last_step:
            self._target.drop_after(step)
            self._last_step = step
