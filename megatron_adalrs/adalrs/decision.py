"""The words in which a controller tells the trainer what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Event(str, Enum):
    """What a decision was about; the values are what the journal records."""

    WINDOW = "window"
    """A window ended and nothing changes."""
    INITIAL_KEPT = "initial_kept"
    """Robust mode: the weights before the first step are kept, for a restart race."""
    CONTROL_STARTED = "control_started"
    """Robust mode: the steps begin that a trial will be compared with."""
    TRIAL_STARTED = "trial_started"
    CAUGHT_UP = "caught_up"
    """Robust mode: a new run from the initial weights has taken as many steps as the old one had."""
    ACCEPTED = "accepted"
    """The trial is better than its reference by more than the margin: its steps and its rate stay."""
    FAILED = "failed"
    """The trial is worse than its reference by more than the margin (paper), or not better (robust):
    undone."""
    NEUTRAL = "neutral"
    """The trial cannot be told from its reference: undone."""
    ABORTED = "aborted"
    """A trial's loss was not finite or far above its reference: undone at once, and failed."""
    SCALED_DOWN = "scaled_down"
    """The loss rose over two windows in a row: the rate is cut, no step is undone."""
    INTERRUPTED = "interrupted"
    """The trial under way is taken back to its start, so that the run can be saved."""
    SEARCH_ENDED = "search_ended"
    """The scale is final. Takes the place of the last window's `WINDOW` event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do before the next step. The trainer carries out `capture`, then `restore`; what `release`
    names it may free, or keep the memory of for the next one of that name.

    After an ordinary step `event` is None: there is nothing to carry out or to record, only the two scales
    are set. Velocities and their errors are in loss per step; None where unknown.
    """

    scale_before: float
    """Factor on the learning rate up to now. Robust mode, verdicts: the one tried, or the one that it
    replaces."""
    scale_after: float
    """Factor on the learning rate from the next step on."""
    event: Enum | None = None
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
    gain: float | None = None
    """Robust mode: mean of control loss minus trial loss over the last steps of both, in nats."""
    gain_error: float | None = None
    """Standard error of `gain`."""
    threshold: float | None = None
    """Window and trial start: a trial starts below this velocity. Verdict: the margin either side of
    `reference_velocity`, or the least `gain`. Rate cut: the loss rises below this velocity. Aborted: the
    largest earlier loss, or the `gain` below which a trial ends."""
    discarded_steps: int = 0
    """Steps that this decision undoes."""
    skipped_samples: tuple[int, int] | None = None
    """Samples, first to last - 1 in the order of the data, that no step is to see any more."""
    reason: str = ""
    """One sentence with the numbers, for people."""
