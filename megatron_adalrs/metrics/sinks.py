"""Dispatch of records to sinks. A sink that cannot be written loses records but does not stop training."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Record = Mapping[str, Any]


class Sink(Protocol):
    """Destination of records. `kind` is train, eval, corpora, decision or run."""

    name: str
    """Name in warnings."""

    def write(self, kind: str, record: Record) -> None:
        """Write a record, or raise OSError and write nothing of it."""

    def close(self) -> None:
        """Write everything that is still pending."""


class Metrics:
    """Passes every record, with a time stamp, to every sink.

    A warning on stderr reports the first failure of a sink, and its recovery with the number of lost records.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        self._missing: Counter[str] = Counter()

    def add(self, sink: Sink) -> None:
        """Write the following records to another sink as well."""
        self._sinks.append(sink)

    def write(self, kind: str, record: Record) -> None:
        """Write a record of this kind to every sink."""
        stamped = {"kind": kind, **record, "time": time.time()}
        for sink in self._sinks:
            try:
                sink.write(kind, stamped)
            except OSError as error:
                self._failed(sink, error)
            else:
                self._recovered(sink)

    def close(self) -> None:
        """Close every sink and report lost records."""
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
            _warn(f"cannot write {sink.name}: {error.strerror or error}; training continues without it")

    def _recovered(self, sink: Sink) -> None:
        if missing := self._missing.pop(sink.name, 0):
            _warn(f"{sink.name} can be written again; it lacks {missing} records")


def _warn(text: str) -> None:
    try:
        print(f"warning: {text}", file=sys.stderr, flush=True)
    except OSError:  # stderr is closed too
        return
