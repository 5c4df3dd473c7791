"""What is wrong with a step's loss and gradient, and what to do about it: numbers in, a decision out.

Three policies for a step that went wrong, which all ranks see alike, since they are given the same floats:

- skip: the update was not accepted, so the weights are as before. The step does not count and its batch is
passed over:
  the run goes on as if the data did not have it.
- rewind: weights, optimizer, random streams, the search's state and this memory go back to the last snapshot.
All
  batches from there to the offending one are passed over (as in PaLM, arXiv 2204.02311, section 5.1).
- stop: the update was not accepted; the run is saved as it was before the step, and ends.

When the policy does not help (`max_consecutive`, `max_skipped`), the run stops, whichever it is.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from megatron_adalrs.adalrs.decision import Decision
from megatron_adalrs.checkpoint.train_state import TrainState, count_samples, joined
from megatron_adalrs.config.loss_guard import LossGuardConfig

REWIND = "rewind"
"""Name of the snapshot to rewind to."""


class GuardEvent(str, Enum):
    """Kinds of decision of the loss guard; the values are recorded in the decision journal."""

    SKIPPED = "loss_guard_skipped"
    """The step is undone and its batch is skipped."""
    REWOUND = "loss_guard_rewound"
    """The run goes back to the last snapshot and continues after the offending batch."""
    STOPPED = "loss_guard_stopped"
    """The run ends with the weights from before the step."""


@dataclass(frozen=True)
class LossMemory:
    """Mean and variance of the losses so far; of many, mostly of the last ones."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    scale: float = 1.0
    """Of the learning rate at which they were seen."""

    def after(self, loss: float, window: int) -> LossMemory:
        """With one more loss. The first `window` weigh the same, then weights fall by 1/e a window.

        Source: Finch 2009, "Incremental calculation of weighted mean and variance", equations 124 and 143.
        """
        share = 1 / min(self.count + 1, window)
        surprise = loss - self.mean
        variance = (1 - share) * (self.variance + share * surprise**2)
        return LossMemory(self.count + 1, self.mean + share * surprise, variance, self.scale)


class LossGuard:
    """Judges the steps of a run that no search may undo.

    Args:
        train_iters: of which `max_skipped` is a share.
        scales_loss: whether a gradient that overflows is the loss scale's business, as with fp16.
    """

    def __init__(self, settings: LossGuardConfig, train_iters: int, scales_loss: bool) -> None:
        self.settings = settings
        self.memory = LossMemory()
        self._max_skipped_batches = settings.max_skipped_batches(train_iters)
        self._scales_loss = scales_loss
        self._in_a_row = 0
        self._furthest = 0  # the step that went wrong furthest on, of those in a row

    @property
    def is_on(self) -> bool:
        return self.settings.policy != "off"

    @property
    def needs_snapshots(self) -> bool:
        return self.settings.policy == "rewind"

    @property
    def refuses_updates(self) -> bool:
        """Whether `accepts` is to be asked before each update: going back to a snapshot undoes it anyway."""
        return self.settings.policy in ("skip", "stop")

    def expect(self, scale: float) -> None:
        """Before a step at this scale of the learning rate: at another one than before losses may be other
        for good, so that their memory begins anew."""
        if scale != self.memory.scale:
            self.memory = LossMemory(scale=scale)

    def accepts(self, loss: float, grad_norm: float) -> bool:
        return self.fault(loss, grad_norm) is None

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, for people; None if nothing is."""
        if not math.isfinite(loss):
            return f"loss {loss:.4g} is not finite"
        if not math.isfinite(grad_norm):
            return f"a gradient is not finite (loss {loss:.4g})"
        memory, deviation = self.memory, math.sqrt(self.memory.variance)
        highest = memory.mean + self.settings.sigma * deviation
        if memory.count < self.settings.min_history or loss <= highest:
            return None
        return (
            f"loss {loss:.4g} is above {memory.mean:.4g} + {self.settings.sigma:g} x {deviation:.2g} = "
            f"{highest:.4g}"
        )

    def observe(
        self,
        numbers: tuple[float, float, bool],
        state: TrainState,
        batch: int,
        scale: float,
        past: TrainState | None,
    ) -> Decision | None:
        """Judge the step just taken; None: nothing is wrong with it, or the policy is off.

        Args:
            numbers: loss, gradient norm, and whether the update was made.
            state: of the run, this step counted.
            batch: samples of a step.
            scale: of the learning rate; a decision leaves it as it is.
            past: state of the run at the snapshot that there is to rewind to.
        """
        if not self.is_on:
            return None
        loss, grad_norm, applied = numbers
        fault = self.fault(loss, grad_norm)
        overflowed = math.isfinite(loss) and not math.isfinite(grad_norm) and not applied
        if fault is None or (overflowed and self._scales_loss):
            if applied:
                self.memory = self.memory.after(loss, self.settings.window)
            if state.step >= self._furthest:
                self._in_a_row = 0
            return None
        self._in_a_row += 1
        self._furthest = max(self._furthest, state.step)
        return self._decide(fault, state, batch, scale, past)

    def state_dict(self) -> dict[str, Any]:
        """The whole state; Python's json writes and reads it back exactly."""
        return {"memory": asdict(self.memory), "in_a_row": self._in_a_row, "furthest": self._furthest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned, under whatever settings."""
        self.memory = LossMemory(**state["memory"])
        self._in_a_row, self._furthest = state["in_a_row"], state["furthest"]

    def _decide(
        self, fault: str, state: TrainState, batch: int, scale: float, past: TrainState | None
    ) -> Decision:
        if past is None or not self.needs_snapshots:
            to, first, restore = state.step - 1, state.consumed_samples - batch, None
        else:
            to, first, restore = past.step, past.consumed_samples, REWIND
        span = (first, state.consumed_samples + self.settings.extra_skipped_batches * batch)
        why = self._reason_to_stop(count_samples(joined(state.skipped_samples, span)), batch)
        if why:
            event, what = GuardEvent.STOPPED, f"back to step {to}, and an end: {why}"
            self._in_a_row = self._furthest = 0  # a run that is resumed has all its chances again
        else:
            event = GuardEvent.REWOUND if restore else GuardEvent.SKIPPED
            what = f"back to step {to}, and on without samples {span[0]} to {span[1] - 1}"
        return Decision(
            event=event,
            step=to,
            scale_before=scale,
            scale_after=scale,
            restore=restore,
            discarded_steps=state.step - to,
            skipped_samples=None if why else span,
            reason=f"step {state.step}: {fault}; {what}",
        )

    def _reason_to_stop(self, skipped_samples: int, batch: int) -> str | None:
        settings = self.settings
        if settings.policy == "stop":
            return "loss_guard.policy is stop"
        if self._in_a_row > settings.max_consecutive:
            return (
                f"loss_guard.max_consecutive is {settings.max_consecutive}, and no step was kept beyond "
                f"this one"
            )
        if skipped_samples > self._max_skipped_batches * batch:
            return (
                f"loss_guard.max_skipped allows to pass over {self._max_skipped_batches * batch} samples, "
                f"and this would "
                f"make {skipped_samples}"
            )
        return None
