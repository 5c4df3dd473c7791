"""What a user can set about the search, and where those settings put it in a given run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

_SHORTEST_WINDOW = 3  # the fewest points for which a least-squares slope has a standard error
_SHORTEST_DEFAULT_WINDOW = 20


@dataclass(frozen=True)
class SearchPlan:
    """Where a search takes place, in kept steps."""

    window: int
    """Length of a window and of a trial."""
    search_start: int
    """First step at which a trial may start or the rate be cut."""
    search_end: int
    """Last step at which a trial may end or the rate be cut."""
    train_iters: int
    """Length of the run."""

    @property
    def watch_start(self) -> int:
        """Where the first window begins: any decision needs two, and the second ends at `search_start`."""
        return self.search_start - 2 * self.window


@dataclass(frozen=True)
class AdaLRSSettings:
    """Settings of the AdaLRS learning-rate search (arXiv 2506.13274).

    Raises:
        ValueError: a field is out of its range; the message names it as `adalrs.<field>`.
    """

    enabled: bool = False
    """Search the base learning rate while training."""
    mode: Literal["paper"] = "paper"
    """Rule of the search: `paper` compares the loss descent velocity of consecutive windows."""
    alpha: float = 3.0
    """Factor by which a trial raises the learning rate, before decay. Above 1; coprime with beta is best."""
    beta: float = 2.0
    """Divisor of the learning rate after a failed trial or a rising loss, before decay. Above 1."""
    decay: float = 0.99
    """Factor on alpha and beta after each adjustment (lambda in the paper). In (0, 1]; 1: no decay."""
    window: int | None = None
    """Steps in a window and in a trial, at least 3. Default: 0.025 * train_iters, but no fewer than 20."""
    search_start: float = 0.1
    """Progress (kept steps / train_iters) at which the search begins. Two windows are observed before it."""
    search_end: float = 0.4
    """Progress (kept steps / train_iters) by which the search has ended."""
    decay_threshold: float = 1.0
    """A trial starts when the velocity falls below this times the previous window's (theta in the paper)."""
    on_fail: Literal["down", "stay"] = "down"
    """After a failed trial: `down` divides the learning rate by beta, `stay` leaves it."""
    min_scale: float = 1e-4
    """Smallest factor that the search may put on the learning rate. In (0, 1]."""
    max_scale: float = 1e4
    """Largest factor that the search may put on the learning rate, trials included. At least 1."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, float) and not _is_finite_number(value):
                raise _bad(field.name, value, "a finite number")
        _require(self.mode == "paper", "mode", self.mode, '"paper"')
        _require(self.on_fail in ("down", "stay"), "on_fail", self.on_fail, '"down" or "stay"')
        _require(self.alpha > 1, "alpha", self.alpha, "above 1")
        _require(self.beta > 1, "beta", self.beta, "above 1")
        _require(0 < self.decay <= 1, "decay", self.decay, "above 0 and at most 1")
        if self.window is not None:
            is_whole = isinstance(self.window, int) and not isinstance(self.window, bool)
            _require(
                is_whole and self.window >= _SHORTEST_WINDOW,
                "window",
                self.window,
                f"a whole number of steps, at least {_SHORTEST_WINDOW}",
            )
        _require(0 <= self.search_start <= 1, "search_start", self.search_start, "between 0 and 1")
        _require(
            self.search_start < self.search_end <= 1,
            "search_end",
            self.search_end,
            f"above adalrs.search_start={self.search_start} and at most 1",
        )
        _require(self.decay_threshold > 0, "decay_threshold", self.decay_threshold, "above 0")
        _require(0 < self.min_scale <= 1, "min_scale", self.min_scale, "above 0 and at most 1")
        _require(self.max_scale >= 1, "max_scale", self.max_scale, "at least 1")

    def resolve(self, train_iters: int, warmup_iters: int = 0) -> SearchPlan:
        """The search in steps, for a run of `train_iters` steps, the first `warmup_iters` of them warm-up.

        Raises:
            ValueError: the search does not fit into the run; the message shows the arithmetic.
        """
        if train_iters < 1:
            raise ValueError(f"train_iters={train_iters} must be at least 1")
        window = self.window
        if window is None:
            window = max(_SHORTEST_DEFAULT_WINDOW, round(0.025 * train_iters))
        start = round(self.search_start * train_iters)
        end = round(self.search_end * train_iters)
        plan = SearchPlan(window, start, end, train_iters)
        arithmetic = (
            f"adalrs.search_start={self.search_start} of train_iters={train_iters} is step {start}, minus "
            f"two windows of adalrs.window={window} steps: the watch begins at step {plan.watch_start}"
        )
        if plan.watch_start < 0:
            raise ValueError(f"{arithmetic}, before step 0; raise adalrs.search_start or lower adalrs.window")
        if plan.watch_start < warmup_iters:
            raise ValueError(
                f"{arithmetic}, inside the warm-up of {warmup_iters} steps; raise adalrs.search_start, or "
                "lower adalrs.window or the warm-up"
            )
        if end - start < window:
            raise ValueError(
                f"adalrs.search_start={self.search_start} to adalrs.search_end={self.search_end} of "
                f"train_iters={train_iters} is steps {start} to {end}: {end - start} steps cannot hold a "
                f"trial of adalrs.window={window} steps; raise adalrs.search_end or lower adalrs.window"
            )
        return plan

    def raise_factor(self, adjustments: int) -> float:
        """alpha' = max(decay**t * alpha, 1), by which a trial raises the rate after t verdicts and cuts."""
        return max(self.decay**adjustments * self.alpha, 1.0)

    def cut_factor(self, adjustments: int) -> float:
        """beta' = 1 / max(decay**t * beta, 1), by which the rate is cut after t verdicts and cuts."""
        return 1 / max(self.decay**adjustments * self.beta, 1.0)


def check_same_search(saved: dict[str, Any], settings: AdaLRSSettings, plan: SearchPlan) -> None:
    """Reject a saved search (`settings` and `plan` as dicts) that was made under other settings.

    Raises:
        ValueError: names the first field that differs. `adalrs.enabled` may differ.
    """
    mine = {f"adalrs.{name}": value for name, value in asdict(settings).items() if name != "enabled"}
    theirs = {f"adalrs.{name}": value for name, value in saved["settings"].items()}
    # train_iters before the rest of the plan, which follows from it
    mine |= {"train_iters": plan.train_iters} | asdict(plan)
    theirs |= saved["plan"]
    for name, value in mine.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{name}={value!r}, but the saved search has {name}={theirs.get(name)!r}: "
                "a search can only go on with the settings it began with"
            )


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, name: str, value: object, requirement: str) -> None:
    if not holds:
        raise _bad(name, value, requirement)


def _bad(name: str, value: object, requirement: str) -> ValueError:
    return ValueError(f"adalrs.{name}={value!r} must be {requirement}")
