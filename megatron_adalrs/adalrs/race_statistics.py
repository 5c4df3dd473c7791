"""Statistics of a race: differences of two arms' losses, step by step on the same batches.

None stands for a step without a usable loss: the optimizer skipped it, or the loss was not finite. Such
steps are left out. Every threshold is a multiple of the losses' own noise or descent, so that it means the
same for any corpus and model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

Losses = Sequence[float | None]

NOISE_WINDOW = 8
"""Number of losses whose mean estimates the current loss."""
# As fractions of the decrease of the loss since the first step, which was 2.5 nats where they were measured.
_HOPELESS_EARLY, _HOPELESS_LATE = 0.1, 0.02
_FAR = 0.2


@dataclass(frozen=True)
class Gain:
    """Mean of control minus trial loss in nats, its standard error, and the threshold of a verdict."""

    mean: float
    error: float
    threshold: float = math.nan

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.error:.2g}"


def gain(control: Losses, trial: Losses, last: int) -> Gain:
    """Return the gain over the last steps of both arms; nan with fewer than two usable pairs."""
    return _gain(control[-last:], trial[-last:])


def spread(control: Losses) -> float:
    """Return the standard deviation of an arm's losses; nan with fewer than two."""
    losses = [loss for loss in control if loss is not None]
    return statistics.stdev(losses) if len(losses) > 1 else math.nan


def left_behind(control: Losses, trial: Losses, spread: float) -> Gain | None:
    """Return the gain of a trial that is above the control by more than `spread` at the end, or None."""
    if len(trial) < NOISE_WINDOW:
        return None
    recent = slice(len(trial) - NOISE_WINDOW, len(trial))
    return _below(_gain(control[recent], trial[recent]), -spread)


def hopeless(opening: Losses, trial: Losses, warmup: int) -> Gain | None:
    """Return the gain of a new run that is too far above the old one to be worth completing; otherwise None.

    Judged every `NOISE_WINDOW` steps from 0.4 of the opening on, but not before the end of the warm-up: until
    then a rate may help that does damage afterwards.
    """
    step, lead = len(trial), len(opening)
    if not max(0.4 * lead, warmup + NOISE_WINDOW) <= step <= lead or step % NOISE_WINDOW:
        return None
    recent = slice(max(0, step - 2 * NOISE_WINDOW), step)
    measured = _gain(opening[recent], trial[recent])
    gap = _HOPELESS_EARLY if step < 0.6 * lead else _HOPELESS_LATE
    return _below(measured, min(-5 * measured.error, -gap * descent(opening)))


def is_far(gain: Gain, opening: Losses) -> bool:
    """Return whether a new run is so far above the old one that a later one will not be better either."""
    return gain.mean < -_FAR * descent(opening)


def descent(opening: Losses) -> float:
    """Return the decrease of the loss from the first to the last of these steps, in nats."""
    losses = [loss for loss in opening if loss is not None]
    if len(losses) < 2 * NOISE_WINDOW:
        return 0.0
    return max(0.0, statistics.fmean(losses[:NOISE_WINDOW]) - statistics.fmean(losses[-NOISE_WINDOW:]))


def any_usable(losses: Losses) -> bool:
    """Return whether any step has a usable loss."""
    return any(loss is not None for loss in losses)


def _below(measured: Gain, threshold: float) -> Gain | None:
    return replace(measured, threshold=threshold) if measured.mean < threshold else None


def _gain(control: Losses, trial: Losses) -> Gain:
    pairs = zip(control, trial, strict=True)
    differences = [mine - other for mine, other in pairs if mine is not None and other is not None]
    if len(differences) < 2:
        return Gain(math.nan, math.nan)
    return Gain(statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences)))
