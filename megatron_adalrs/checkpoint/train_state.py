"""How far a run is: steps, and the position in its data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

Span = tuple[int, int]
"""Samples first to last - 1 in the order of the data."""


@dataclass
class TrainState:
    """How far a run is. Only the trainer moves it."""

    step: int = 0
    """Kept steps completed."""
    consumed_samples: int = 0
    """Position in the data: samples that the kept steps have consumed, and those passed over."""
    total_steps: int = 0
    """Steps executed, discarded ones included."""
    evaluated_at: int = 0
    """Step of the last evaluation."""
    snapshot_seconds: float = 0.0
    """Time that a search has spent on capturing and restoring snapshots."""
    guard_undone_steps: int = 0
    """Steps that were undone for bad numbers: part of those discarded."""
    skipped_samples: tuple[Span, ...] = ()
    """Samples that no step uses: in order, apart from each other. Known for good: going back forgets none."""

    def __post_init__(self) -> None:
        self.skipped_samples = tuple(
            (first, last) for first, last in self.skipped_samples
        )  # JSON has no tuples

    @staticmethod
    def validate(saved: dict[str, Any]) -> None:
        """Check that `TrainState(**saved)` can be made of what JSON holds, and makes sense.

        Raises:
            ValueError: names the entry that is unknown, or not what it should be.
        """
        known = {field.name: field.type for field in fields(TrainState)}
        for name, value in saved.items():
            if name not in known:
                raise ValueError(f"progress has {name!r}, which this version does not know")
            kinds = {"int": (int,), "float": (int, float)}.get(str(known[name]))
            is_sound = _are_spans(value) if kinds is None else type(value) in kinds and value >= 0
            if not is_sound:
                raise ValueError(f"progress.{name} is {value!r:.40}, which is no {known[name]} of a run")

    @property
    def discarded_steps(self) -> int:
        return self.total_steps - self.step

    @property
    def next_sample(self) -> int:
        """Where the next batch begins."""
        position = self.consumed_samples
        for first, last in self.skipped_samples:
            if first <= position < last:
                position = last
        return position

    @property
    def used_samples(self) -> int:
        """Samples that the kept steps have learned from."""
        here = self.consumed_samples
        return here - sum(min(last, here) - min(first, here) for first, last in self.skipped_samples)

    def advance(self, samples: int) -> None:
        self.consumed_samples = self.next_sample + samples
        self.step += 1
        self.total_steps += 1

    def undo(self, steps: int, samples: int, skipped_samples: Span | None) -> None:
        """Take back the last step, of so many samples, for a bad number that costs `steps`; pass over
        samples."""
        self.step -= 1
        self.consumed_samples -= samples
        self.guard_undone_steps += steps
        if skipped_samples is not None:
            self.skipped_samples = joined(self.skipped_samples, skipped_samples)

    def restore_progress(self, past: TrainState) -> None:
        """To the step and data position of a snapshot. What was executed since stays counted."""
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
    """`spans`, which are in order and apart from each other, with one more; what touches becomes one."""
    first, last = span
    apart = []
    for one in spans:
        if one[0] <= last and first <= one[1]:
            first, last = min(first, one[0]), max(last, one[1])
        else:
            apart.append(one)
    return tuple(sorted([*apart, (first, last)]))


def count_samples(spans: Iterable[Span]) -> int:
    return sum(last - first for first, last in spans)


def is_due(every: int | None, step: int, last: int) -> bool:
    """Whether a step that `every` divides lies after step `last`, up to and including `step`."""
    return every is not None and step // every > last // every
