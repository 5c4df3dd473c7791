"""Trials and kept steps of a run, reconstructed from its decision journal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_adalrs.metrics.records import DecisionRecord

UNDOING_VERDICTS = frozenset({"failed", "neutral", "aborted", "interrupted"})
"""Verdicts after which the snapshot from the start of the trial is restored."""
LOSS_GUARD = "loss_guard"
"""Prefix of the loss guard's events. Its snapshots are not in the journal: the undone steps are the last ones
before the event."""
RUNNING = "running"
"""Verdict of a trial that has not ended."""


@dataclass(frozen=True)
class Trial:
    """Executed steps first_total_step to last_total_step (inclusive) at another scale, from start_step on."""

    start_step: int
    first_total_step: int
    last_total_step: int
    verdict: str
    scale_before: float
    scale_trial: float
    scale_after: float

    @property
    def length(self) -> int:
        """Number of executed steps."""
        return self.last_total_step - self.first_total_step + 1


def find_trials(decisions: Sequence[DecisionRecord], last_total_step: int) -> Iterator[Trial]:
    """Yield the trials of a journal; one that has not ended extends to `last_total_step`."""
    opened: DecisionRecord | None = None

    def trial(opened: DecisionRecord, last: int, verdict: str, scale_after: float) -> Trial:
        scales = (opened.scale_before, opened.scale_after, scale_after)
        return Trial(opened.step, opened.total_steps + 1, last, verdict, *scales)

    for decision in decisions:
        if decision.event == "trial_started":
            opened = decision
        elif opened is not None and decision.event in UNDOING_VERDICTS | {"accepted"}:
            yield trial(opened, decision.total_steps, decision.event, decision.scale_after)
            opened = None
    if opened is not None:
        yield trial(opened, last_total_step, RUNNING, opened.scale_after)


def kept_steps(
    step: NDArray[np.int64], total_steps: NDArray[np.int64], decisions: Sequence[DecisionRecord]
) -> NDArray[np.bool_]:
    """Return which executed steps are part of the final run, bool[steps].

    The journal says which snapshots were taken and restored. A step that was replaced by a later step with
    the same number is not kept either, even if the journal has no reason for it.

    Args:
        step: Kept steps at each executed step.
        total_steps: Executed steps at each executed step.
        decisions: Journal of the run.
    """
    history: list[tuple[int, int]] = []  # executed steps (first, last] that the run consists of
    since = 0
    captured: dict[str, list[tuple[int, int]]] = {}
    for decision in decisions:
        if decision.capture is not None:
            captured[decision.capture] = [*history, (since, decision.total_steps)]
        if decision.event.startswith(LOSS_GUARD):
            end = decision.total_steps - decision.discarded_steps
            parts = [*history, (since, decision.total_steps)]
            history, since = (
                [(first, min(last, end)) for first, last in parts if first < end],
                decision.total_steps,
            )
        elif decision.restore is not None:
            history, since = captured.get(decision.restore, history), decision.total_steps
    kept = np.zeros(total_steps.shape, dtype=np.bool_)
    for first, last in [*history, (since, np.iinfo(np.int64).max)]:
        kept |= (total_steps > first) & (total_steps <= last)
    candidates = np.flatnonzero(kept)
    later_minimum = np.minimum.accumulate(step[candidates][::-1])[::-1]
    kept[candidates[:-1][step[candidates[:-1]] >= later_minimum[1:]]] = False
    return kept
