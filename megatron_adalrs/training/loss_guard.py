"""Loss guard: finds non-finite losses and gradients and loss spikes, and decides what to do about them.

Every rank passes the same numbers and gets the same decision. There are three policies for a faulty step:

- `skip`: The update is not made, so the weights stay as they were. The step does not count, and the run
  continues with the next batch.
- `rewind`: Weights, optimizer state, random streams, the state of the search and the loss statistics go back
  to the last snapshot. All batches from there to the faulty one are skipped, as in PaLM (arXiv 2204.02311,
  section 5.1).
- `stop`: The update is not made. The run is saved as it was before the step, and ends.

If the policy does not help (`max_consecutive`, `max_skipped`), the run stops, whichever policy it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Protocol

from megatron_adalrs.adalrs.decision import Decision
from megatron_adalrs.checkpoint.train_state import TrainState, count_samples, joined
from megatron_adalrs.config import Config
from megatron_adalrs.config.loss_guard import LossGuardConfig
from megatron_adalrs.engine import StepResult

REWIND = "rewind"
"""Name of the snapshot that a rewind restores."""
AcceptUpdate = Callable[[float, float], bool]
"""Returns whether to make an update, given the loss and the gradient norm of the step."""


class GuardEvent(str, Enum):
    """Kind of a decision of the loss guard; the values are recorded in the decision journal."""

    SKIPPED = "loss_guard_skipped"
    """The step is undone and its batch is skipped."""
    REWOUND = "loss_guard_rewound"
    """The run goes back to the last snapshot and continues after the offending batch."""
    STOPPED = "loss_guard_stopped"
    """The run ends with the weights from before the step."""


@dataclass(frozen=True)
class LossStatistics:
    """Running mean and variance of the losses, in which recent losses have more weight."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    scale: float = 1.0
    """Scale of the learning rate at these losses."""

    def after(self, loss: float, window: int) -> LossStatistics:
        """Return the statistics with one more loss.

        The first `window` losses have equal weights. After that a weight falls by a factor of e in `window`
        steps.

        Source: Finch 2009, "Incremental calculation of weighted mean and variance", equations 124 and 143.
        """
        share = 1 / min(self.count + 1, window)
        difference = loss - self.mean
        variance = (1 - share) * (self.variance + share * difference**2)
        return LossStatistics(self.count + 1, self.mean + share * difference, variance, self.scale)


class StepGuard(Protocol):
    """Checks each step, and decides what to do about a faulty one."""

    statistics: LossStatistics

    @property
    def needs_snapshots(self) -> bool:
        """Whether the trainer must take snapshots named `REWIND`."""

    def before_step(self, scale: float) -> AcceptUpdate | None:
        """Prepare for a step with this scale of the learning rate.

        Returns:
            Function that the engine asks before the update; None if every update is made.
        """

    def observe(
        self,
        result: StepResult,
        state: TrainState,
        batch_size: int,
        scale: float,
        rewind_to: TrainState | None,
    ) -> Decision | None:
        """Check the step that was just taken.

        Args:
            result: Loss, gradient norm, and whether the update was made.
            state: Progress of the run, including this step.
            batch_size: Samples in a step.
            scale: Scale of the learning rate, which a decision of the guard does not change.
            rewind_to: Progress of the run at the snapshot named `REWIND`; None if there is none.

        Returns:
            What to do about a faulty step; None if the step is sound.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state in types that JSON preserves exactly."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned, with any settings."""


class NoLossGuard:
    """Loss guard that accepts every step. It is used without a policy, and during a trial of the search."""

    statistics = LossStatistics()
    needs_snapshots = False

    def before_step(self, scale: float) -> AcceptUpdate | None:
        """Accept the update."""
        return None

    def observe(
        self,
        result: StepResult,
        state: TrainState,
        batch_size: int,
        scale: float,
        rewind_to: TrainState | None,
    ) -> Decision | None:
        """Accept the step."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the state."""


class LossGuard:
    """Loss guard with a policy.

    Args:
        settings: Policy and thresholds; the policy is not `off`.
        train_iters: Steps of the run, of which `max_skipped` is a share.
        scales_loss: Whether the engine handles gradients that overflow by scaling the loss, as with fp16.
    """

    def __init__(self, settings: LossGuardConfig, train_iters: int, scales_loss: bool) -> None:
        self.settings = settings
        self.statistics = LossStatistics()
        self._max_skipped_batches = settings.max_skipped_batches(train_iters)
        self._scales_loss = scales_loss
        self._consecutive = 0  # faulty steps without progress between them
        self._furthest = 0  # highest step among the consecutive faulty ones

    @property
    def needs_snapshots(self) -> bool:
        """Whether the trainer must take snapshots named `REWIND`."""
        return self.settings.policy == "rewind"

    def before_step(self, scale: float) -> AcceptUpdate | None:
        """Prepare for a step with this scale of the learning rate.

        The statistics start again when the scale changes, since the level of the loss may change with it.
        With `rewind`, every update is made: restoring the snapshot undoes a faulty one.
        """
        if scale != self.statistics.scale:
            self.statistics = LossStatistics(scale=scale)
        return None if self.needs_snapshots else self.accepts

    def accepts(self, loss: float, grad_norm: float) -> bool:
        """Return whether a step with these numbers is sound."""
        return self.find_fault(loss, grad_norm) is None

    def find_fault(self, loss: float, grad_norm: float) -> str | None:
        """Return a description of the fault of a step; None if the step is sound."""
        if not math.isfinite(loss):
            return f"loss {loss:.4g} is not finite"
        if not math.isfinite(grad_norm):
            return f"a gradient is not finite (loss {loss:.4g})"
        statistics = self.statistics
        deviation = math.sqrt(statistics.variance)
        highest = statistics.mean + self.settings.sigma * deviation
        if statistics.count < self.settings.min_history or loss <= highest:
            return None
        return (
            f"loss {loss:.4g} is above {statistics.mean:.4g} + {self.settings.sigma:g} x {deviation:.2g} = "
            f"{highest:.4g}"
        )

    def observe(
        self,
        result: StepResult,
        state: TrainState,
        batch_size: int,
        scale: float,
        rewind_to: TrainState | None,
    ) -> Decision | None:
        """Check the step that was just taken; see `StepGuard.observe`. A step without a loss is sound."""
        if result.loss is None:
            return None
        fault = self.find_fault(result.loss, result.grad_norm)
        has_finite_loss = math.isfinite(result.loss)
        overflowed = has_finite_loss and not math.isfinite(result.grad_norm) and not result.applied
        if fault is None or (overflowed and self._scales_loss):
            if result.applied:
                self.statistics = self.statistics.after(result.loss, self.settings.window)
            if state.step >= self._furthest:
                self._consecutive = 0
            return None
        self._consecutive += 1
        self._furthest = max(self._furthest, state.step)
        return self._decide(fault, state, batch_size, scale, rewind_to if self.needs_snapshots else None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state in types that JSON preserves exactly."""
        return {
            "statistics": asdict(self.statistics),
            "consecutive": self._consecutive,
            "furthest": self._furthest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned, with any settings.

        The state of `NoLossGuard` is empty and changes nothing.
        """
        if state:
            self.statistics = LossStatistics(**state["statistics"])
            self._consecutive = state["consecutive"]
            self._furthest = state["furthest"]

    def _decide(
        self, fault: str, state: TrainState, batch_size: int, scale: float, rewind_to: TrainState | None
    ) -> Decision:
        """Return the decision about a faulty step.

        Args:
            rewind_to: Progress at the snapshot to restore; None if only the faulty step is undone.
        """
        if rewind_to is None:
            step = state.step - 1
            first = state.consumed_samples - batch_size
        else:
            step = rewind_to.step
            first = rewind_to.consumed_samples
        span = (first, state.consumed_samples + self.settings.extra_skipped_batches * batch_size)
        why = self._reason_to_stop(count_samples(joined(state.skipped_samples, span)), batch_size)
        if why:
            event = GuardEvent.STOPPED
            consequence = f"stopping at step {step}: {why}"
            self._consecutive = 0  # a resumed run starts counting again
            self._furthest = 0
        else:
            event = GuardEvent.SKIPPED if rewind_to is None else GuardEvent.REWOUND
            consequence = f"back to step {step}, skipping samples {span[0]} to {span[1] - 1}"
        return Decision(
            event=event,
            step=step,
            scale_before=scale,
            scale_after=scale,
            restore=None if rewind_to is None else REWIND,
            discarded_steps=state.step - step,
            skipped_samples=None if why else span,
            reason=f"step {state.step}: {fault}; {consequence}",
        )

    def _reason_to_stop(self, skipped_samples: int, batch_size: int) -> str | None:
        settings = self.settings
        if settings.policy == "stop":
            return "loss_guard.policy is stop"
        if self._consecutive > settings.max_consecutive:
            return (
                f"loss_guard.max_consecutive is {settings.max_consecutive}, and no step was kept beyond "
                f"this one"
            )
        most = self._max_skipped_batches * batch_size
        if skipped_samples > most:
            return (
                f"loss_guard.max_skipped allows {most} skipped samples, and this event would raise that to "
                f"{skipped_samples}"
            )
        return None


def build_loss_guard(config: Config) -> StepGuard:
    """Build the loss guard that `loss_guard.policy` selects."""
    if config.loss_guard.policy == "off":
        return NoLossGuard()
    training = config.training
    return LossGuard(config.loss_guard, training.train_iters, training.precision == "fp16")
