"""Sink that turns records into the scalars of a dashboard, such as TensorBoard.

`metrics/__init__.py` says how to add a metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from megatron_adalrs.metrics.sinks import Record

SEARCH = "adalrs/"
"""Prefix of tags over executed steps, discarded ones included. All other tags are over kept steps."""


class Target(Protocol):
    """Dashboard that scalars are written to."""

    name: str
    """Name in warnings."""

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Write the scalars of one step by tag, or raise OSError and write none of them."""

    def close(self) -> None:
        """Write everything that is still pending."""


class Scalars:
    """Sink of scalars over kept steps.

    Steps that may be undone are held back until the verdict. The loss of a trial is also written at once,
    under `trial/`.
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

    def __init__(self, target: Target, log_interval: int) -> None:
        self.name = target.name
        self._interval, self._target = log_interval, target
        self._pending: dict[str, list[Record]] = {"control": [], "trial": []}

    def write(self, kind: str, record: Record) -> None:
        if kind == "train" and record["step"] % self._interval == 0:
            phase = record["phase"]
            if phase not in ("control", "trial", "restart-control", "restart"):
                self._add_train(record)
            elif phase in self._pending:
                self._pending[phase].append(record)
            if phase in ("trial", "restart"):
                self._target.add({f"{phase}/loss": record["loss"]}, record["step"])
        elif kind == "eval":
            self._target.add(
                {f"{record['split']}/{name}": record[name] for name in self.EVAL}, record["step"]
            )
        elif kind == "corpora":
            for use in record["corpora"]:
                tags = {f"corpora/{use['name']}/{name}": use[name] for name in self.CORPUS}
                self._target.add(tags, record["step"])
        elif kind == "decision":
            self._add_decision(record)

    def close(self) -> None:
        self._target.close()

    def _add_train(self, record: Record) -> None:
        self._target.add({f"train/{name}": record[name] for name in self.TRAIN}, record["step"])

    def _add_decision(self, record: Record) -> None:
        if record["event"] == "loss_guard_skipped":
            return  # a skipped batch decides nothing about the steps that are held back
        values = {f"{SEARCH}scale": record["scale_after"]}
        if record["velocity"] is not None:
            values[f"{SEARCH}velocity"] = record["velocity"]
        self._target.add(values, record["total_steps"])
        event = record["event"]
        if event in ("accepted", "failed", "aborted", "neutral"):
            # Without backtracking the steps of a failed trial are kept too.
            trial_stays = event == "accepted" or not record["restore"]
            for kept in self._pending["trial" if trial_stays else "control"]:
                self._add_train(kept)
        if event != "trial_started":
            for pending in self._pending.values():
                pending.clear()
