"""What a user can set about the search, and where those settings put it in a given run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from megatron_adalrs.adalrs.search_plan import RacePlan, SearchPlan

# The fewest points for which a least-squares slope has a standard error, and for which a mean difference has
# one once the first steps of a return or a restart are left out.
_SHORTEST = {"window": 3, "climb_steps": 8, "trial_steps": 1, "return_steps": 10, "restart_steps": 12}
_SHORTEST_DEFAULT_WINDOW = 20
_SHORTEST_OPENING = 16
_TOTAL_DISCARDED = 0.5


@dataclass(frozen=True)
class AdaLRSSettings:
    """Settings of the AdaLRS learning-rate search (arXiv 2506.13274).

    Raises:
        ValueError: a field is out of its range; the message names it as `adalrs.<field>`.
    """

    enabled: bool = False
    """Search the base learning rate while training."""
    mode: Literal["paper", "robust"] = "paper"
    """Rule of the search: `paper` compares the loss descent velocity of consecutive windows, `robust` races
    two futures of the same weights on the same batches."""
    alpha: float = 3.0
    """Factor by which a trial raises the learning rate, before decay. Above 1; in paper mode best coprime
    with beta."""
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
    backtrack: bool = True
    """Paper mode: undo the steps of a trial that fails or is neutral. False, for comparison only: they are
    kept, and only the learning rate goes back."""
    min_scale: float = 1e-4
    """Smallest factor that the search may put on the learning rate. In (0, 1]."""
    max_scale: float = 1e4
    """Largest factor that the search may put on the learning rate, trials included. At least 1."""
    max_discarded: float | None = None
    """Steps that verdicts may discard at most, as a share of train_iters: no trial or race begins that could
    exceed it. Default: no limit; with budget `total` 0.5."""
    budget: Literal["kept", "total"] = "kept"
    """What train_iters and the schedule count: `kept` steps, so that a run sees the same data as one without
    a search, or `total`, discarded ones included, so that it takes the same compute."""
    snapshot_dir: str | None = None
    """Directory on a local disk of every host to keep snapshots in, where host memory is short. They have no
    names there and are gone when the process ends. Default: host memory."""
    climb: bool = True
    """Robust mode: before the first full race, from the end of the warm-up on, raise a rate that is far too
    small in races without return steps: the first must gain `climb_gain`, those above the rate given 0.4 of
    that. It ends half way to a rate that did about as well."""
    climb_steps: int | None = None
    """Robust mode: steps of each arm of the climb's races, at least 8. Default: 0.015 * train_iters, but no
    fewer than 16."""
    climb_gain: float = 0.01
    """Robust mode: what the first trial of the climb must gain, as a share of what the loss has fallen by so
    far."""
    trial_steps: int | None = None
    """Robust mode: steps of a trial at the raised rate. Default: 0.015 * train_iters, but no fewer than
    20."""
    return_steps: int | None = None
    """Robust mode: steps after them at the old rate, before the verdict; at least 10. Default: as
    trial_steps."""
    restart_steps: int | None = None
    """Robust mode: steps in which a new run is compared with the old one; at least 12. Default: 0.012 *
    train_iters, but no fewer than 24."""
    confidence: float = 2.5
    """Robust mode: standard errors by which a trial must be better."""
    restart_factor: float = 9.0
    """Robust mode: divisor of the learning rate of a restart. Above 1."""
    restart_confidence: float = -2.5
    """Robust mode: standard errors by which a new run must be better; below 0, by which it may be worse."""
    finest_factor: float = 1.6
    """Robust mode: the factor, whose root is taken after each race that is lost, below which races end. Above
    1."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, float) and not _is_finite_number(value):
                raise _bad(field.name, value, "a finite number")
        _require(self.mode in ("paper", "robust"), "mode", self.mode, '"paper" or "robust"')
        _require(self.budget in ("kept", "total"), "budget", self.budget, '"kept" or "total"')
        _require(self.on_fail in ("down", "stay"), "on_fail", self.on_fail, '"down" or "stay"')
        _require(self.alpha > 1, "alpha", self.alpha, "above 1")
        _require(self.beta > 1, "beta", self.beta, "above 1")
        _require(0 < self.decay <= 1, "decay", self.decay, "above 0 and at most 1")
        for name, shortest in _SHORTEST.items():
            steps = getattr(self, name)
            is_whole = isinstance(steps, int) and not isinstance(steps, bool)
            if steps is not None:
                requirement = f"a whole number of steps, at least {shortest}"
                _require(is_whole and steps >= shortest, name, steps, requirement)
        _require(
            self.window is None or self.mode == "paper",
            "window",
            self.window,
            "left out in robust mode: it has trial_steps",
        )
        _require(
            self.backtrack or self.mode == "paper",
            "backtrack",
            self.backtrack,
            "left out in robust mode: its races are nothing without going back",
        )
        if self.max_discarded is not None:
            is_share = _is_finite_number(self.max_discarded) and self.max_discarded >= 0
            _require(is_share, "max_discarded", self.max_discarded, "a number of at least 0")
        _require(self.confidence >= 0, "confidence", self.confidence, "at least 0")
        _require(self.climb_gain >= 0, "climb_gain", self.climb_gain, "at least 0")
        _require(self.restart_factor > 1, "restart_factor", self.restart_factor, "above 1")
        _require(self.finest_factor > 1, "finest_factor", self.finest_factor, "above 1")
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

    def resolve(self, train_iters: int, warmup_iters: int = 0) -> SearchPlan | RacePlan:
        """The search in steps, for a run of `train_iters` steps, the first `warmup_iters` of them warm-up.

        Raises:
            ValueError: the search does not fit into the run; the message shows the arithmetic.
        """
        if train_iters < 1:
            raise ValueError(f"train_iters={train_iters} must be at least 1")
        resolve = self._resolve_windows if self.mode == "paper" else self._resolve_races
        return resolve(train_iters, warmup_iters)

    def affords(self, discarded: int, train_iters: int) -> bool:
        """Whether so many discarded steps are within `max_discarded`."""
        return discarded <= self.discarded_limit * train_iters

    @property
    def discarded_limit(self) -> float:
        """The share of train_iters that may be discarded; infinite without a limit."""
        if self.max_discarded is not None:
            return self.max_discarded
        return _TOTAL_DISCARDED if self.budget == "total" else math.inf

    def _resolve_races(self, train_iters: int, warmup_iters: int) -> RacePlan:
        trial_steps = self.trial_steps or max(20, round(0.015 * train_iters))
        return_steps = self.return_steps or max(20, round(0.015 * train_iters))
        restart_steps = self.restart_steps or max(24, round(0.012 * train_iters))
        start, end = round(self.search_start * train_iters), round(self.search_end * train_iters)
        climb_steps = self.climb_steps or max(16, round(0.015 * train_iters))
        plan = RacePlan(
            min(start, max(warmup_iters, climb_steps)) if self.climb else start,
            climb_steps,
            start,
            end,
            trial_steps,
            return_steps,
            round(0.4 * return_steps),
            restart_steps,
            restart_steps // 3,
            train_iters,
            warmup_iters,
        )
        begins = f"adalrs.search_start={self.search_start} of train_iters={train_iters} is step {start}"
        if start < _SHORTEST_OPENING:
            raise ValueError(
                f"{begins}: a race needs {_SHORTEST_OPENING} steps before it; raise adalrs.search_start"
            )
        if start < warmup_iters:
            raise ValueError(
                f"{begins}, inside the warm-up of {warmup_iters} steps; raise adalrs.search_start"
            )
        if end - start < plan.race_steps:
            raise ValueError(
                f"{begins}, and adalrs.search_end={self.search_end} is step {end}: {end - start} steps "
                f"cannot hold "
                f"a race of adalrs.trial_steps + adalrs.return_steps = {trial_steps} + {return_steps} = "
                f"{plan.race_steps} steps"
            )
        return plan

    def _resolve_windows(self, train_iters: int, warmup_iters: int) -> SearchPlan:
        window = self.window
        if window is None:
            window = max(_SHORTEST_DEFAULT_WINDOW, round(0.025 * train_iters))
        start = round(self.search_start * train_iters)
        end = round(self.search_end * train_iters)
        plan = SearchPlan(window, start, end, train_iters, self.backtrack)
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


def check_same_search(
    saved: dict[str, Any], settings: AdaLRSSettings, plan: SearchPlan | RacePlan, entries: Iterable[str]
) -> None:
    """Reject a saved search (`settings` and `plan` as dicts) that was made under other settings, or lacks an
    entry.

    Raises:
        ValueError: names the first field that differs, or what is missing. `adalrs.enabled` and
            `adalrs.snapshot_dir` may differ.
    """
    if saved.get("mode") == "fixed":
        raise ValueError("adalrs.enabled=True, but the saved state is of a run with adalrs.enabled=False")
    for name in ("settings", "plan"):
        if name not in saved:
            raise ValueError(f"the saved AdaLRS state lacks {name}")
    may_differ = ("enabled", "snapshot_dir")
    mine = {f"adalrs.{name}": value for name, value in asdict(settings).items() if name not in may_differ}
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
    missing = set(entries) - saved.keys()
    if missing:
        raise ValueError(f"the saved AdaLRS state lacks {', '.join(sorted(missing))}")


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, name: str, value: object, requirement: str) -> None:
    if not holds:
        raise _bad(name, value, requirement)


def _bad(name: str, value: object, requirement: str) -> ValueError:
    return ValueError(f"adalrs.{name}={value!r} must be {requirement}")
