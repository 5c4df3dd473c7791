"""The interface of a controller to a trainer, and the function that builds one."""

from __future__ import annotations

from typing import Any, Protocol

from megatron_adalrs.adalrs.decision import Decision, Event
from megatron_adalrs.adalrs.paper import PaperController
from megatron_adalrs.adalrs.robust import RobustController
from megatron_adalrs.adalrs.search_plan import SearchPlan
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
    """Decides after every step on the factor on the learning rate and on snapshots of the run.

    The trainer calls `resume` once before a process's first step and `observe` after every step, and applies
    each decision before the next step. It saves a checkpoint after `interrupt`, or where
    `has_pending_rollback` is False.
    """

    @property
    def scale(self) -> float:
        """Factor on the learning rate of the next step."""

    @property
    def step(self) -> int:
        """Number of kept steps."""

    @property
    def schedule_offset(self) -> int:
        """Steps that the schedule and the end of the run count in addition to `step`; see `schedule_step`.

        With budget `total` these are the steps that verdicts have discarded, otherwise 0. Both arms of a
        comparison have the same offset, so that they are at the same point of the schedule. Steps that an
        interruption makes a run repeat are not counted.
        """

    @property
    def phase(self) -> str:
        """State of the search, as it is recorded with each step.

        "before", "watch", "trial" or "done" in paper mode, a value of `robust.State` in robust mode, "fixed"
        without a search.
        """

    @property
    def has_pending_rollback(self) -> bool:
        """Return whether steps were taken that may be undone, or set aside that may be restored."""

    @property
    def needs_initial(self) -> bool:
        """Return whether the snapshot `robust.INITIAL` of the initial weights may be asked for."""

    def observe(self, loss: float, applied: bool = True) -> Decision:
        """Count one more kept step with this loss; `applied` is False when the optimizer skipped it."""

    def interrupt(self) -> Decision:
        """Go back to the start of the trial under way, if any, so that the run can be saved."""

    def resume(self) -> Decision:
        """Return what to do before the first step of a process."""

    def reset_scale(self) -> None:
        """Set the scale to 1 for good, because the run continues at a rate that was given anew.

        Only a search that is over may be told so.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state, in types that json writes and reads exactly."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: The state is from a run with other settings.
        """


def observed(loss: float | None, applied: bool) -> tuple[float, bool]:
    """Return the arguments of `Controller.observe` for a step; its loss is None if no target counts.

    Such a step is counted like one that the optimizer skipped, whose loss is not used.
    """
    return (0.0, False) if loss is None else (loss, applied)


def schedule_step(controller: Controller, step: int, warmup_iters: int) -> int:
    """Return the step of the schedule after `step` kept steps.

    A restart from the initial weights repeats the warm-up, independent of the number of discarded steps.
    """
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
        """Return an ordinary decision: there is nothing to go back to."""
        return self._keep

    def resume(self) -> Decision:
        """Return an ordinary decision: there is nothing to repeat."""
        return self._keep

    def reset_scale(self) -> None:
        """Do nothing: the scale is always 1."""

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps."""
        return {"mode": "fixed", "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved number of steps.

        Raises:
            ValueError: The state is from a run with a search, whose scale would be lost.
        """
        if state.get("mode") != "fixed":
            mode = state.get("mode")
            raise ValueError(
                f"adalrs.mode=off, but the saved state comes from a run with adalrs.mode={mode}: without the "
                f"search the rate that it found would be lost; continue with --adalrs.mode {mode} and its "
                "settings"
            )
        self.step = state["step"]


def build_controller(settings: AdaLRSSettings, train_iters: int, warmup_iters: int = 0) -> Controller:
    """Return the controller for these settings and a run of `train_iters` steps that begins with a warm-up.

    Raises:
        ValueError: The search does not fit in the run; see `AdaLRSSettings.resolve`.
    """
    if not settings.is_on:
        return FixedRate()
    plan = settings.resolve(train_iters, warmup_iters)
    if isinstance(plan, SearchPlan):
        return PaperController(settings, plan)
    return RobustController(settings, plan)
