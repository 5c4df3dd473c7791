"""The words in which a controller tells the trainer what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Event(str, Enum):
    """What a decision was about; the values are what the journal records."""

    WINDOW = "window"
    """A window ended and nothing changes."""
    TRIAL_STARTED = "trial_started"
    ACCEPTED = "accepted"
    """The trial descended faster than its reference by more than the margin: its steps and its rate stay."""
    FAILED = "failed"
    """The trial descended more slowly than its reference by more than the margin: undone."""
    NEUTRAL = "neutral"
    """The trial cannot be told from its reference: undone."""
    ABORTED = "aborted"
    """A trial's loss was not finite or above every earlier one: undone at once, and failed."""
    SCALED_DOWN = "scaled_down"
    """The loss rose over two windows in a row: the rate is cut, no step is undone."""
    INTERRUPTED = "interrupted"
    """The trial under way is taken back to its start, so that the run can be saved."""
    SEARCH_ENDED = "search_ended"
    """The scale is final. Takes the place of the last window's `WINDOW` event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do before the next step. The trainer carries out `restore`, then `release`, then `capture`.

    After an ordinary step `event` is None: there is nothing to carry out or to record, only the two scales
    are set. Velocities and their errors are in loss per step; None where unknown.
    """

    scale_before: float
    """Factor on the learning rate up to now."""
    scale_after: float
    """Factor on the learning rate from the next step on."""
    event: Event | None = None
    """None: an ordinary step."""
    step: int | None = None
    """Kept steps completed once the decision has been carried out; None after an ordinary step."""
    capture: str | None = None
    """Name of the snapshot to take now."""
    restore: str | None = None
    """Name of the snapshot to go back to."""
    release: str | None = None
    """Name of the snapshot that is no longer needed."""
    velocity: float | None = None
    """Minus the least-squares slope of the window or trial that has just ended."""
    error: float | None = None
    """Standard error of `velocity`."""
    reference_velocity: float | None = None
    """What `velocity` is compared with: that of the window before."""
    reference_error: float | None = None
    """Standard error of `reference_velocity`."""
    threshold: float | None = None
    """Window and trial start: a trial starts below this velocity. Verdict: the margin either side of
    `reference_velocity`. Rate cut: the loss rises below this velocity. Aborted: the largest earlier loss."""
    discarded_steps: int = 0
    """Steps that this decision undoes."""
    reason: str = ""
    """One sentence with the numbers, for people."""
