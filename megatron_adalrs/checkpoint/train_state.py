"""Progress of a run: steps taken, and the position in the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

Span = tuple[int, int]
"""Samples `first` to `last - 1` in the order of the data."""


@dataclass
class TrainState:
    """Progress of a run. Only the trainer changes it."""

    step: int = 0
    """Steps that are kept, that is, not rolled back."""
    consumed_samples: int = 0
    """Position in the data: samples consumed by the kept steps, and skipped samples."""
    total_steps: int = 0
    """Steps executed, including discarded ones."""
    evaluated_at: int = 0
    """Step of the last evaluation."""
    snapshot_seconds: float = 0.0
    """Seconds that the search has spent on taking and restoring snapshots."""
    guard_undone_steps: int = 0
    """Discarded steps that the loss guard has undone."""
    skipped_samples: tuple[Span, ...] = ()
    """Samples that no step uses, as sorted, disjoint spans. A rollback does not remove any."""

    def __post_init__(self) -> None:
        self.skipped_samples = tuple(
            (first, last) for first, last in self.skipped_samples
        )  # JSON has no tuples

    @staticmethod
    def validate(saved: dict[str, Any]) -> None:
        """Check the entries of a `TrainState` that was read from JSON.

        Raises:
            ValueError: An entry is unknown or not valid; the message names it.
        """
        known = {field.name: field.type for field in fields(TrainState)}
        for name, value in saved.items():
            if name not in known:
                raise ValueError(f"progress has {name!r}, which is not a field of this version")
            kinds = {"int": (int,), "float": (int, float)}.get(str(known[name]))
            is_sound = _are_spans(value) if kinds is None else type(value) in kinds and value >= 0
            if not is_sound:
                raise ValueError(f"progress.{name} is {value!r:.40}, which is not a valid {known[name]}")

    @property
    def discarded_steps(self) -> int:
        """Executed steps that were rolled back or undone."""
        return self.total_steps - self.step

    @property
    def next_sample(self) -> int:
        """Position of the first sample of the next batch."""
        position = self.consumed_samples
        for first, last in self.skipped_samples:
            if first <= position < last:
                position = last
        return position

    @property
    def used_samples(self) -> int:
        """Number of samples that the kept steps were trained on."""
        here = self.consumed_samples
        return here - sum(min(last, here) - min(first, here) for first, last in self.skipped_samples)

    def advance(self, samples: int) -> None:
        """Count a completed step that consumed this many samples."""
        self.consumed_samples = self.next_sample + samples
        self.step += 1
        self.total_steps += 1

    def undo(self, steps: int, samples: int, skipped_samples: Span | None) -> None:
        """Take back the last step, which the loss guard has rejected.

        Args:
            steps: Number of executed steps that are lost.
            samples: Number of samples of the step.
            skipped_samples: Samples to skip from now on, if any.
        """
        self.step -= 1
        self.consumed_samples -= samples
        self.guard_undone_steps += steps
        if skipped_samples is not None:
            self.skipped_samples = joined(self.skipped_samples, skipped_samples)

    def restore_progress(self, past: TrainState) -> None:
        """Return to the step and data position of a snapshot. Executed steps stay counted."""
        self.step, self.consumed_samples = past.step, past.consumed_samples


def _are_spans(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(span, list)
        and len(span) == 2
        and all(type(place) is int for place in span)
        and 0 <= span[0] <= span[1]
        for span in value
    )


def joined(spans: Iterable[Span], span: Span) -> tuple[Span, ...]:
    """Add a span to sorted, disjoint spans, and merge those that touch."""
    first, last = span
    apart = []
    for one in spans:
        if one[0] <= last and first <= one[1]:
            first, last = min(first, one[0]), max(last, one[1])
        else:
            apart.append(one)
    return tuple(sorted([*apart, (first, last)]))


def count_samples(spans: Iterable[Span]) -> int:
    """Return the number of samples in disjoint spans."""
    return sum(last - first for first, last in spans)


def is_due(every: int | None, step: int, last: int) -> bool:
    """Return whether a multiple of `every` is greater than `last` and at most `step`."""
    return every is not None and step // every > last // every
