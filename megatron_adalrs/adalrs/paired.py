"""What a race measures: differences of two arms' losses, step by step on the same batches.

None stands for a step without a usable loss: the optimizer skipped it, or the loss was not finite. It takes no part.
Every threshold is a multiple of the losses' own noise or descent, so that it means the same for any corpus and model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Losses = Sequence[float | None]

NOISE_WINDOW = 8
"""Losses whose mean tells where a run is."""
# In parts of what the loss has fallen by since the first step, which was 2.5 nats where they were measured.
_NOT_INFERIOR = 0.004
_HOPELESS_EARLY, _HOPELESS_LATE = 0.1, 0.02


def gain(control: Losses, trial: Losses, last: int) -> tuple[float, float]:
    """Mean of control minus trial over their last steps, in nats, and its standard error."""
    return _mean_and_error(_differences(control[-last:], trial[-last:]))


def is_left_behind(control: Losses, trial: Losses) -> bool:
    """Whether the trial's last losses lie above the control's by more than the control's standard deviation."""
    if len(trial) < NOISE_WINDOW:
        return False
    recent = slice(len(trial) - NOISE_WINDOW, len(trial))
    differences = _differences(control[recent], trial[recent])
    losses = [loss for loss in control if loss is not None]
    return bool(differences) and len(losses) > 1 and -statistics.fmean(differences) > statistics.stdev(losses)


def is_hopeless(opening: Losses, trial: Losses) -> bool:
    """Whether a new run is so far above the old one, whose opening it goes through, that its last part need not be run.

    It is asked every `NOISE_WINDOW` steps from 0.4 of the opening on.
    """
    step, lead = len(trial), len(opening)
    if not 0.4 * lead <= step <= lead or step % NOISE_WINDOW:
        return False
    recent = slice(max(0, step - 2 * NOISE_WINDOW), step)
    mean, error = _mean_and_error(_differences(opening[recent], trial[recent]))
    gap = _HOPELESS_EARLY if step < 0.6 * lead else _HOPELESS_LATE
    return mean < -5 * error and mean < -gap * descent(opening)


def tolerance(opening: Losses) -> float:
    """By how much a new run may be worse and still be as good, in nats."""
    return _NOT_INFERIOR * descent(opening)


def descent(opening: Losses) -> float:
    """What the loss fell by from the first steps to the last of these: the scale of what matters, in nats."""
    losses = [loss for loss in opening if loss is not None]
    if len(losses) < 2 * NOISE_WINDOW:
        return 0.0
    return max(0.0, statistics.fmean(losses[:NOISE_WINDOW]) - statistics.fmean(losses[-NOISE_WINDOW:]))


def any_usable(losses: Losses) -> bool:
    return any(loss is not None for loss in losses)


def _differences(control: Losses, trial: Losses) -> list[float]:
    pairs = zip(control, trial, strict=True)
    return [mine - other for mine, other in pairs if mine is not None and other is not None]


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; nan where there are fewer than two values."""
    if len(values) < 2:
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
