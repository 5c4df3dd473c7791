"""Configuration of the loss guard."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_adalrs.config.base import Fraction, Group


class LossGuardConfig(Group):
    """Handling of losses and gradients that are not finite, and of loss spikes."""

    policy: Literal["off", "skip", "rewind", "stop"] = "off"
    """Reaction to a loss event. skip: do not apply the update and continue with the next batch. rewind:
    restore the last snapshot in memory and continue with the batches after the offending one. stop: save the
    weights from before the event and exit with code 5."""
    sigma: PositiveFloat = 6.0
    """A loss this many standard deviations above its running mean is a spike."""
    window: Annotated[int, Field(ge=2)] = 100
    """Time constant in steps of the running mean and variance: a loss this many steps ago has weight 1/e."""
    min_history: Annotated[int, Field(ge=2)] = 50
    """Number of losses before a spike can be detected. Values that are not finite are always detected."""
    rewind_interval: PositiveInt = 100
    """With rewind: kept steps between snapshots. One is also taken at every checkpoint, so that resuming is
    exact."""
    extra_skipped_batches: NonNegativeInt = 0
    """Number of additional batches to skip after an offending one."""
    max_consecutive: PositiveInt = 5
    """Number of events without progress after which the next event stops the run, for any policy."""
    max_skipped: Fraction = 0.2
    """Maximum number of skipped batches, as a fraction of train_iters. The run stops if it is exceeded."""

    def max_skipped_batches(self, train_iters: int) -> int:
        """Return the maximum number of skipped batches in the run."""
        return int(self.max_skipped * train_iters) if self.policy in ("skip", "rewind") else 0

    @property
    def max_skipped_at_once(self) -> int:
        """Maximum number of batches that one event skips."""
        return (self.rewind_interval if self.policy == "rewind" else 1) + self.extra_skipped_batches
