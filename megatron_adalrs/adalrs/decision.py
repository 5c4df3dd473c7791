"""Decisions of a controller, and the one function that applies a decision to a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, Protocol, TypeVar

State = TypeVar("State")


class Event(str, Enum):
    """Kinds of decision of a learning-rate search; the values are recorded in the decision journal."""

    WINDOW = "window"
    """Paper mode: a window ended and nothing changes."""
    INITIAL_KEPT = "initial_kept"
    """Robust mode: a snapshot of the initial weights is taken, for a restart race."""
    CONTROL_STARTED = "control_started"
    """Robust mode: the control arm of a race begins, with which a trial is compared."""
    TRIAL_STARTED = "trial_started"
    """A trial begins at another learning rate."""
    CAUGHT_UP = "caught_up"
    """Robust mode: a restart from the initial weights has taken as many steps as the run it replaces had."""
    ACCEPTED = "accepted"
    """The trial is better than its reference by more than the margin: its steps and its rate are kept."""
    FAILED = "failed"
    """The trial is worse than its reference by more than the margin (paper mode), or not better (robust
    mode): its steps are undone."""
    NEUTRAL = "neutral"
    """Paper mode: the trial's velocity is within the margin of its reference: its steps are undone."""
    ABORTED = "aborted"
    """A trial's loss was not finite or far above its reference: its steps are undone at once and it counts
    as failed."""
    SCALED_DOWN = "scaled_down"
    """Paper mode: the loss rose over two consecutive windows: the rate is cut and no step is undone."""
    INTERRUPTED = "interrupted"
    """The run goes back to the start of the trial or race in progress, so that it can be saved."""
    SEARCH_ENDED = "search_ended"
    """The scale is final. In paper mode this replaces the last window's `WINDOW` event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionFields:
    """Fields that a decision and its line in the decision journal share.

    Velocities and their errors are in loss per step; None where unknown.
    """

    scale_before: float
    """Factor on the learning rate until now. For a verdict of robust mode: the factor of the trial, or the
    factor that an accepted trial replaces."""
    scale_after: float
    """Factor on the learning rate from the next step on."""
    capture: str | None = None
    """Name of the snapshot to take. It is taken before `restore` is applied."""
    restore: str | None = None
    """Name of the snapshot to go back to."""
    velocity: float | None = None
    """Minus the least-squares slope of the loss over the window or trial that has just ended."""
    error: float | None = None
    """Standard error of `velocity`."""
    reference_velocity: float | None = None
    """Velocity of the window before, with which `velocity` is compared."""
    reference_error: float | None = None
    """Standard error of `reference_velocity`."""
    gain: float | None = None
    """Robust mode: mean of control loss minus trial loss over the last steps of both arms, in nats."""
    gain_error: float | None = None
    """Standard error of `gain`."""
    threshold: float | None = None
    """Number with which the decision compares. End of a window and start of a trial: a trial starts below
    this velocity. Verdict: the margin on either side of `reference_velocity`, or the smallest sufficient
    `gain`. Rate cut: the loss rises below this velocity. Aborted trial: the largest earlier loss, or the
    `gain` below which a trial is aborted."""
    discarded_steps: int = 0
    """Number of steps that the decision undoes."""
    skipped_samples: tuple[int, int] | None = None
    """Samples that no later step uses, from the first up to but excluding the second, in data order."""
    reason: str = ""
    """Explanation in one sentence, with the numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision(DecisionFields):
    """Action to take before the next step; see `apply_decision`.

    After an ordinary step `event` is None: there is nothing to apply or to record, and only the two scales
    are set.
    """

    event: Enum | None = None
    """Kind of decision; None after an ordinary step."""
    step: int | None = None
    """Number of kept steps once the decision has been applied; None after an ordinary step."""


class Restorable(Protocol):
    """A run whose complete state can be captured and restored by name."""

    def capture(self, name: str) -> None:
        """Take a snapshot of the current state under this name, replacing an earlier one."""

    def restore(self, name: str) -> None:
        """Go back to the snapshot with this name, which stays available."""


def apply_decision(decision: Decision, run: Restorable) -> None:
    """Take the snapshot that a decision asks for, then go back to the one that it names.

    A decision may ask for both: the end of a control arm is captured before the run goes back to where the
    arm began.
    """
    if decision.capture is not None:
        run.capture(decision.capture)
    if decision.restore is not None:
        run.restore(decision.restore)


@dataclass
class InMemoryRun(Generic[State]):
    """A run whose state is one immutable value; for replays, simulations and tests.

    `restore` raises KeyError for a snapshot that was never taken.
    """

    state: State
    snapshots: dict[str, State] = field(default_factory=dict)

    def capture(self, name: str) -> None:
        """Keep the current state under this name."""
        self.snapshots[name] = self.state

    def restore(self, name: str) -> None:
        """Go back to the state with this name."""
        self.state = self.snapshots[name]
