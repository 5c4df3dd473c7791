"""The controller's contract with a trainer, and the choice of one."""

from __future__ import annotations

from typing import Any, Protocol

from megatron_adalrs.adalrs.decision import Decision, Event
from megatron_adalrs.adalrs.paper import PaperController
from megatron_adalrs.adalrs.robust import RobustController
from megatron_adalrs.adalrs.settings import AdaLRSSettings

__all__ = [
    "Controller",
    "Decision",
    "Event",
    "FixedRate",
    "PaperController",
    "RobustController",
    "build_controller",
    "schedule_step",
]


class Controller(Protocol):
    """Decides after every step about the factor on the learning rate and about snapshots of the run.

    The trainer calls `resume` once before a process's first step and `observe` after every step, and carries
    out each decision before the next step. It saves a checkpoint after `interrupt`, or where
    `has_pending_rollback` is False.
    """

    scale: float
    """Factor on the learning rate of the next step."""
    step: int
    """Kept steps completed."""
    schedule_offset: int
    """Steps that the schedule and the end of the run count on top of `step`: with budget `total` those that
    verdicts have discarded, otherwise 0. Both arms of a comparison have the same, so that they are at one
    point of the schedule. See `schedule_step`.
    Steps that an interruption makes a run repeat are not counted."""
    phase: str
    """"before", "watch", "trial", "done"; robust mode has "control", "restart-control" and "restart" too;
    "fixed" when there is no search."""
    has_pending_rollback: bool
    """Whether steps were taken that may be undone, or set aside that may come back."""
    needs_initial: bool
    """Whether the snapshot `robust.INITIAL` of the weights before the first step may be asked for."""

    def observe(self, loss: float, applied: bool = True) -> Decision:
        """Count one more kept step with this loss; `applied` is False when the optimizer skipped it."""

    def interrupt(self) -> Decision:
        """Go back to the start of the trial under way, if any, so that the run can be saved."""

    def resume(self) -> Decision:
        """What to do before the first step of a process."""

    def state_dict(self) -> dict[str, Any]:
        """The whole state, in types that json writes and reads back exactly."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; ValueError when it is of a run with other settings."""


def schedule_step(controller: Controller, step: int, warmup_iters: int) -> int:
    """Where the schedule is after so many kept steps. A new run from the initial weights has a warm-up of its
    own, whatever was discarded before it."""
    return step if step < warmup_iters else step + controller.schedule_offset


class FixedRate:
    """The controller of a run without a search: every step is ordinary and the scale is 1."""

    def __init__(self) -> None:
        self.scale = 1.0
        self.step = 0
        self.schedule_offset = 0
        self.phase = "fixed"
        self.has_pending_rollback = False
        self.needs_initial = False
        self._keep = Decision(scale_before=1.0, scale_after=1.0)

    def observe(self, loss: float, applied: bool = True) -> Decision:
        """Count one more step."""
        self.step += 1
        return self._keep

    def interrupt(self) -> Decision:
        """Nothing to go back to."""
        return self._keep

    def resume(self) -> Decision:
        """Nothing to take up again."""
        return self._keep

    def state_dict(self) -> dict[str, Any]:
        """The number of steps."""
        return {"mode": "fixed", "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved number of steps.

        Raises:
            ValueError: the state is of a run with a search, whose scale would be lost.
        """
        if state.get("mode") != "fixed":
            raise ValueError(
                "adalrs.enabled=False, but the saved state is of a run with adalrs.enabled=True: "
                "without the search the learning rate that it found would be lost"
            )
        self.step = state["step"]


def build_controller(settings: AdaLRSSettings, train_iters: int, warmup_iters: int = 0) -> Controller:
    """The controller that the settings ask for, in a run of `train_iters` steps that begins with a warm-up.

    Raises:
        ValueError: the search does not fit in the run; see `AdaLRSSettings.resolve`.
    """
    if not settings.enabled:
        return FixedRate()
    kind = PaperController if settings.mode == "paper" else RobustController
    return kind(settings, settings.resolve(train_iters, warmup_iters))
