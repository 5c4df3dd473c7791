"""Records and where they go. A place that cannot be written costs the records there, not the training."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Record = Mapping[str, Any]


class Sink(Protocol):
    """Somewhere that records go. `kind` is train, eval, corpora, decision or run."""

    name: str
    """For people: what cannot be written, when it fails."""

    def write(self, kind: str, record: Record) -> None:
        """Take a record, or raise OSError and keep nothing of it."""

    def close(self) -> None: ...


class Metrics:
    """Hands every record, stamped with the time, to every sink.

    A sink that fails is told on stderr once, and again when it takes records anew, with how many it lacks.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks
        self._missing: Counter[str] = Counter()

    def write(self, kind: str, record: Record) -> None:
        stamped = {"kind": kind, **record, "time": time.time()}
        for sink in self._sinks:
            try:
                sink.write(kind, stamped)
            except OSError as error:
                self._failed(sink, error)
            else:
                self._recovered(sink)

    def close(self) -> None:
        for sink in self._sinks:
            try:
                sink.close()
            except OSError as error:
                self._failed(sink, error)
            if missing := self._missing[sink.name]:
                _warn(f"{sink.name} lacks {missing} records of this run")

    def _failed(self, sink: Sink, error: OSError) -> None:
        self._missing[sink.name] += 1
        if self._missing[sink.name] == 1:
            _warn(f"cannot write {sink.name}: {error.strerror or error}; training goes on without it")

    def _recovered(self, sink: Sink) -> None:
        if missing := self._missing.pop(sink.name, 0):
            _warn(f"{sink.name} can be written again; it lacks {missing} records")


def _warn(text: str) -> None:
    """Where even stderr is gone nobody is left to tell."""
    try:
        print(f"warning: {text}", file=sys.stderr, flush=True)
    except OSError:
        return
