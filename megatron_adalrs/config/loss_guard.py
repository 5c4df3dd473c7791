"""What to do about numbers that go wrong."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_adalrs.config.base import Fraction, Group


class LossGuardConfig(Group):
    """Losses and gradients that are not finite, and loss spikes."""

    policy: Literal["off", "skip", "rewind", "stop"] = "off"
    """skip: leave the weights as they were, and go on with the next batch. rewind: go back to the last
    snapshot in memory, and on with the batches after the offending one. stop: save the weights from before,
    and end with exit code 5."""
    sigma: PositiveFloat = 6.0
    """Standard deviations above its running mean from which a loss is a spike."""
    window: Annotated[int, Field(ge=2)] = 100
    """Steps over which running mean and variance of the loss forget: what lies a window back weighs 1/e."""
    min_history: Annotated[int, Field(ge=2)] = 50
    """Losses to have seen before one can be a spike. What is not finite is found from the first step on."""
    rewind_interval: PositiveInt = 100
    """rewind: kept steps between snapshots. There is one at every checkpoint too, so that a resume is
    exact."""
    extra_skipped_batches: NonNegativeInt = 0
    """Further batches to pass over after an offending one."""
    max_consecutive: PositiveInt = 5
    """Events without a step kept beyond them after which the next one stops the run, whatever the policy."""
    max_skipped: Fraction = 0.2
    """Share of train_iters: the batches that may be passed over in all. More stop the run."""

    def max_skipped_batches(self, train_iters: int) -> int:
        """Batches that may be passed over in all."""
        return int(self.max_skipped * train_iters) if self.policy in ("skip", "rewind") else 0

    @property
    def max_skipped_at_once(self) -> int:
        """Batches that one event passes over at most."""
        return (self.rewind_interval if self.policy == "rewind" else 1) + self.extra_skipped_batches
