"""Settings of the learning-rate search, and their resolution into steps of a given run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from megatron_adalrs.adalrs.search_plan import RacePlan, SearchPlan

# The fewest points for which a least-squares slope has a standard error, and for which a mean difference has
# one once the first steps of a return or a restart are left out.
_SHORTEST = {"window": 3, "climb_steps": 8, "trial_steps": 1, "return_steps": 10, "restart_steps": 12}
_SHORTEST_DEFAULT_WINDOW = 20
_SHORTEST_SHRUNK_WINDOW = 5
_SHORTEST_OPENING = 16

Mode = Literal["off", "paper", "robust"]
_OF_MODE: dict[str, tuple[str, ...]] = {
    "paper": ("beta", "decay", "window", "decay_threshold", "on_fail", "backtrack"),
    "robust": (
        "climb",
        "climb_steps",
        "climb_gain",
        "trial_steps",
        "return_steps",
        "restart_steps",
        "confidence",
        "restart_factor",
        "restart_confidence",
        "finest_factor",
    ),
}
"""Settings that only one mode uses; all others belong to both."""


def uses_setting(mode: str, name: str) -> bool:
    """Return whether a search in this mode uses the setting; with mode `off`, only `mode` is used."""
    if name == "mode" or mode == "off":
        return name == "mode"
    return not any(name in names for other, names in _OF_MODE.items() if other != mode)


def check_given(mode: str, names: Iterable[str]) -> None:
    """Reject settings that a search in this mode does not use, whatever their values.

    Raises:
        ValueError: Names the first of these settings and the mode that uses it.
    """
    for name in names:
        if uses_setting(mode, name):
            continue
        owner = next((other for other, of_mode in _OF_MODE.items() if name in of_mode), None)
        if mode == "off":
            modes = f"--adalrs.mode {owner}" if owner else "--adalrs.mode robust or --adalrs.mode paper"
            raise ValueError(f"adalrs.{name}: has no effect without a search; choose {modes}")
        raise ValueError(f"adalrs.{name}: belongs to adalrs.mode={owner}, but adalrs.mode is {mode}")


@dataclass(frozen=True)
class AdaLRSSettings:
    """Settings of the AdaLRS learning-rate search (arXiv 2506.13274).

    Raises:
        ValueError: A field is out of its range; the message names it as `adalrs.<field>`.
    """

    mode: Mode = "off"
    """Search of the base learning rate while training: `off` trains at the given rate; `robust` compares two
    continuations of the same weights on the same batches (a race), the usual choice; `paper` compares the
    loss descent velocity of consecutive windows, to reproduce the paper."""
    alpha: float = 3.0
    """Factor by which a trial raises the learning rate, before decay. Above 1; in paper mode ideally coprime
    with beta."""
    beta: float = 2.0
    """Paper mode: divisor of the learning rate after a failed trial or a rising loss, before decay. Above
    1."""
    decay: float = 0.99
    """Paper mode: factor on alpha and beta after each adjustment (lambda in the paper). In (0, 1]; 1: no
    decay."""
    window: int | None = None
    """Paper mode: steps in a window and in a trial, at least 3. Default: 0.025 * train_iters, but at least
    20, or less where two windows of 20 do not fit between the warm-up and search_start."""
    search_start: float = 0.1
    """Progress (kept steps / train_iters) at which the search begins. In paper mode, two windows are observed
    before it."""
    search_end: float = 0.4
    """Progress (kept steps / train_iters) by which the search ends."""
    decay_threshold: float = 1.0
    """Paper mode: a trial starts when the velocity falls below this factor times the previous window's (theta
    in the paper)."""
    on_fail: Literal["down", "stay"] = "down"
    """Paper mode: after a failed trial, `down` divides the learning rate by beta and `stay` leaves it."""
    backtrack: bool = True
    """Paper mode: undo the steps of a trial that fails or is neutral. If False, these steps are kept and only
    the learning rate is restored; for comparison only."""
    min_scale: float = 1e-4
    """Smallest factor that the search may apply to the learning rate. In (0, 1]."""
    max_scale: float = 1e4
    """Largest factor that the search may apply to the learning rate, including trials. At least 1."""
    max_discarded: float = 0.5
    """Largest number of steps that the search may discard, as a fraction of train_iters. A trial, race or
    restart that could exceed it does not begin. 0.5 is a third of all executed steps with budget `kept`."""
    budget: Literal["kept", "total"] = "kept"
    """Steps that train_iters and the schedule count: `kept` steps, so that a run sees the same data as one
    without a search, or `total` steps, including discarded ones, so that it takes the same compute."""
    snapshot_dir: str | None = None
    """Directory on a local disk of each host in which to keep snapshots if host memory is short. The files
    are unnamed and are deleted when the process ends. Default: keep snapshots in host memory."""
    climb: bool = True
    """Robust mode: between the end of the warm-up and the first full race, raise a rate that is far too
    small in short races without return steps. The first trial must gain `climb_gain`, later ones 0.4 of it.
    The climb ends halfway to a rate that was about equally good."""
    climb_steps: int | None = None
    """Robust mode: steps of each arm of the climb's races, at least 8. Default: 0.015 * train_iters, but at
    least 16."""
    climb_gain: float = 0.01
    """Robust mode: smallest gain in loss of the climb's first trial, as a fraction of the decrease of the
    loss so far."""
    trial_steps: int | None = None
    """Robust mode: steps of a trial at the raised rate. Default: 0.015 * train_iters, but at least 20."""
    return_steps: int | None = None
    """Robust mode: steps of a trial at the old rate, between the raised rate and the verdict; at least 10.
    Default: 0.015 * train_iters, but at least 20."""
    restart_steps: int | None = None
    """Robust mode: steps over which a restart is compared with the current run; at least 12. Default: 0.012 *
    train_iters, but at least 24."""
    confidence: float = 2.5
    """Robust mode: number of standard errors by which a trial must be better. At least 0."""
    restart_factor: float = 9.0
    """Robust mode: divisor of the learning rate of a restart. Above 1."""
    restart_confidence: float = -2.5
    """Robust mode: number of standard errors by which a restart must be better; if negative, by which it may
    be worse."""
    finest_factor: float = 1.6
    """Robust mode: smallest factor of a race. The factor starts at alpha and becomes its square root after
    each lost race; races end when it falls below this value. Above 1."""

    def __post_init__(self) -> None:
        _require(self.mode in get_args(Mode), "mode", self.mode, '"off", "paper" or "robust"')
        check_given(self.mode, [f.name for f in fields(self) if getattr(self, f.name) != f.default])
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, float) and not _is_finite_number(value):
                raise _bad(field.name, value, "a finite number")
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
        _require(self.max_discarded >= 0, "max_discarded", self.max_discarded, "a number of at least 0")
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

    @property
    def is_on(self) -> bool:
        """Whether the run searches the learning rate."""
        return self.mode != "off"

    def used(self) -> dict[str, Any]:
        """Return the settings that the mode uses, without those that are None."""
        return {
            name: value
            for name, value in asdict(self).items()
            if uses_setting(self.mode, name) and value is not None
        }

    def resolve(self, train_iters: int, warmup_iters: int = 0) -> SearchPlan | RacePlan:
        """Return the plan in steps for a run of `train_iters` steps, of which `warmup_iters` are warm-up.

        Raises:
            ValueError: There is no search, or it does not fit into the run; the message shows the arithmetic.
        """
        if not self.is_on:
            raise ValueError("adalrs.mode=off: there is no search")
        if train_iters < 1:
            raise ValueError(f"train_iters={train_iters} must be at least 1")
        resolve = self._resolve_windows if self.mode == "paper" else self._resolve_races
        return resolve(train_iters, warmup_iters)

    def affords(self, discarded: int, train_iters: int) -> bool:
        """Return whether this number of discarded steps is within `max_discarded`."""
        return discarded <= self.max_discarded * train_iters

    def most_discarded(self, plan: SearchPlan | RacePlan) -> int:
        """Return the largest number of steps that a search with this plan discards."""
        most = math.floor(self.max_discarded * plan.train_iters)
        return min(most, plan.most_in_trials) if isinstance(plan, SearchPlan) else most

    def describe(self, plan: SearchPlan | RacePlan) -> str:
        """Describe a plan and its cost, as a share of all executed steps."""
        most = self.most_discarded(plan)
        executed = plan.train_iters + (most if self.budget == "kept" else 0)
        return f"{plan}, discarding at most {most} steps in total ({most / executed:.1%} of all)"

    def _resolve_races(self, train_iters: int, warmup_iters: int) -> RacePlan:
        start, end = round(self.search_start * train_iters), round(self.search_end * train_iters)
        arm = max(_SHORTEST["return_steps"], min((end - start) // 2, max(20, round(0.015 * train_iters))))
        trial_steps = self.trial_steps or arm
        return_steps = self.return_steps or arm
        restart_steps = self.restart_steps or max(24, round(0.012 * train_iters))
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
        first = max(_SHORTEST_OPENING, warmup_iters)
        remedy = self._range_that_fits(first, plan.race_steps, train_iters)
        if start < _SHORTEST_OPENING:
            raise ValueError(f"{begins}: a race needs {_SHORTEST_OPENING} steps before it; {remedy}")
        if start < warmup_iters:
            raise ValueError(f"{begins}, during the warm-up of {warmup_iters} steps; {remedy}")
        if end - start < plan.race_steps:
            raise ValueError(
                f"{begins}, and adalrs.search_end={self.search_end} is step {end}: {end - start} steps "
                f"are too few for a race of adalrs.trial_steps + adalrs.return_steps = {trial_steps} + "
                f"{return_steps} = {plan.race_steps} steps; "
                f"{self._range_that_fits(start, plan.race_steps, train_iters)}"
            )
        return plan

    def _resolve_windows(self, train_iters: int, warmup_iters: int) -> SearchPlan:
        start = round(self.search_start * train_iters)
        end = round(self.search_end * train_iters)
        window = self.window
        if window is None:
            fits = min((start - warmup_iters) // 2, end - start)
            usual = max(_SHORTEST_DEFAULT_WINDOW, round(0.025 * train_iters))
            window = max(_SHORTEST_SHRUNK_WINDOW, min(fits, usual))
        remedy = self._range_that_fits(max(start, warmup_iters + 2 * window), window, train_iters)
        plan = SearchPlan(window, start, end, train_iters, self.backtrack)
        arithmetic = (
            f"adalrs.search_start={self.search_start} of train_iters={train_iters} is step {start}, minus "
            f"two windows of adalrs.window={window} steps: the first window begins at step {plan.watch_start}"
        )
        if plan.watch_start < 0:
            raise ValueError(f"{arithmetic}, before step 0; {remedy}")
        if plan.watch_start < warmup_iters:
            raise ValueError(f"{arithmetic}, during the warm-up of {warmup_iters} steps; {remedy}")
        if end - start < window:
            raise ValueError(
                f"adalrs.search_start={self.search_start} to adalrs.search_end={self.search_end} of "
                f"train_iters={train_iters} is steps {start} to {end}: {end - start} steps are too few for a "
                f"trial of adalrs.window={window} steps; {remedy}"
            )
        return plan

    def _range_that_fits(self, first: int, length: int, train_iters: int) -> str:
        """Return flags for a search of several trials of this length from step `first` on."""
        start = max(self.search_start, math.ceil(1000 * first / train_iters) / 1000)
        last = round(start * train_iters) + length
        end = max(self.search_end, math.ceil(1000 * min(last + 3 * length, train_iters) / train_iters) / 1000)
        if last > train_iters:
            return f"the search needs a run of more than {last} steps, raise train_iters"
        return f"use --adalrs.search-start {start:g} --adalrs.search-end {min(end, 1.0):g}"

    def raise_factor(self, adjustments: int) -> float:
        """Return alpha' = max(decay**t * alpha, 1), by which a trial raises the rate after t adjustments."""
        return max(self.decay**adjustments * self.alpha, 1.0)

    def cut_factor(self, adjustments: int) -> float:
        """Return beta' = 1 / max(decay**t * beta, 1), by which the rate is cut after t adjustments."""
        return 1 / max(self.decay**adjustments * self.beta, 1.0)


def check_same_search(
    saved: dict[str, Any], settings: AdaLRSSettings, plan: SearchPlan | RacePlan, entries: Iterable[str]
) -> None:
    """Reject a saved search that was made under other settings, or lacks an entry.

    Once the search is over, the length of the run may differ, on which the plan depends.

    Raises:
        ValueError: Names the first field that differs, or what is missing. `adalrs.snapshot_dir` may
            differ.
    """
    if saved.get("mode") == "fixed":
        raise ValueError(
            f"adalrs.mode={settings.mode}, but the saved state comes from a run with adalrs.mode=off: a "
            "search needs the run from its start; continue with --adalrs.mode off, or begin a new run"
        )
    for name in ("settings", "plan"):
        if name not in saved:
            raise ValueError(f"the saved AdaLRS state lacks {name}")
    may_differ = ("snapshot_dir",)
    mine = {f"adalrs.{name}": value for name, value in asdict(settings).items() if name not in may_differ}
    theirs = {f"adalrs.{name}": value for name, value in saved["settings"].items()}
    # train_iters before the rest of the plan, which follows from it
    mine_of_plan = {"train_iters": plan.train_iters} | asdict(plan)
    reason = "a search can only continue with the settings it began with"
    for name, value in mine.items():
        if theirs.get(name) != value:
            raise _differs(name, value, theirs.get(name), reason)
    missing = set(entries) - saved.keys()
    if missing:
        raise ValueError(f"the saved AdaLRS state lacks {', '.join(sorted(missing))}")
    for name, value in mine_of_plan.items():
        if saved["plan"].get(name) != value and not is_over(saved):
            end = saved["plan"].get("search_end")
            still = (
                f"the search is still running, until about step {end}; continue with the earlier value and "
                "change it when the search has ended"
            )
            raise _differs(name, value, saved["plan"].get(name), still)


def is_over(saved: dict[str, Any]) -> bool:
    """Return whether a saved search makes no more decisions: it or its run has ended.

    The run of such a search can be extended at the rate that was found.
    """
    if saved["phase"] in ("done", "ending"):
        return True
    plan = saved["plan"]
    offset = saved["discarded"] if "discarded" in saved else saved["schedule_offset"]
    step = saved["step"] + (offset if saved["settings"]["budget"] == "total" else 0)
    no_window_fits = saved["phase"] == "watch" and step + plan["window"] > plan["search_end"]
    return bool(no_window_fits or step >= plan["train_iters"])


def _differs(name: str, value: object, saved: object, reason: str) -> ValueError:
    return ValueError(f"{name}={value!r}, but the saved search has {name}={saved!r}: {reason}")


def _is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(holds: bool, name: str, value: object, requirement: str) -> None:
    if not holds:
        raise _bad(name, value, requirement)


def _bad(name: str, value: object, requirement: str) -> ValueError:
    return ValueError(f"adalrs.{name}={value!r} must be {requirement}")
