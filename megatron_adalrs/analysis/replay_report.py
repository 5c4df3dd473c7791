"""Report of the replays of a recorded loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from megatron_adalrs.adalrs.decision import Event
from megatron_adalrs.adalrs.settings import AdaLRSSettings
from megatron_adalrs.analysis.loss_curve import deviation
from megatron_adalrs.analysis.loss_log import LossLog
from megatron_adalrs.analysis.replay import (
    UNPAIRED,
    Arms,
    Executed,
    Replay,
    Replayed,
    differences,
    replay,
    unpaired_share,
)
from megatron_adalrs.analysis.search_lengths import lengths_in_steps, with_lengths

LENGTH_FACTORS = (0.5, 1.0, 2.0, 4.0)
ARMS = {"paper": (Arms.EQUAL,), "robust": (Arms.EQUAL, Arms.BETTER, Arms.WORSE)}


@dataclass(frozen=True)
class Row:
    """A decision of a replay, with steps and velocities in steps of the run, not in recorded points."""

    executed: int
    step: int
    event: str
    scale_before: float
    scale_after: float
    noise: float | None
    velocity: float | None
    error: float | None
    reference_velocity: float | None
    gain: float | None
    gain_error: float | None
    threshold: float | None
    discarded_steps: int
    recorded: bool
    reason: str


@dataclass(frozen=True)
class Scenario:
    """A complete search under one assumption about trial losses; `arms` is a value of `Arms`."""

    arms: str
    scale: float
    discarded_steps: int
    finished: bool
    decisions: tuple[Row, ...]


@dataclass(frozen=True)
class Lengths:
    """Precision of windows or races of other lengths; fields are None if they do not fit in the run."""

    steps: Mapping[str, int]
    comparisons: int | None = None
    """Number of windows in paper mode, or of races in robust mode."""
    trials: int | None = None
    signal: float | None = None
    """Paper mode: median of velocity / error."""
    least: float | None = None
    """Median of the smallest detectable difference.

    Paper mode: change of the velocity, relative to the velocity. Robust mode: gain, in nats.
    """
    discarded_steps: int | None = None


@dataclass(frozen=True)
class Report:
    """Replays of one mode, and the precision that the noise of the record allows."""

    mode: str
    source: str
    train_iters: int
    interval: int
    plan: str
    noise: float | None
    """Standard deviation of single losses during the search, in nats."""
    unpaired: float
    basis: str
    scenarios: tuple[Scenario, ...]
    lengths: tuple[Lengths, ...]


def report(
    settings: AdaLRSSettings,
    train_iters: int,
    log: LossLog,
    warmup_iters: int = 0,
    unpaired: float | None = None,
) -> Report:
    """Return the report of one mode.

    Args:
        settings: Settings of the search.
        train_iters: Number of training steps of the run.
        log: Recorded loss.
        warmup_iters: Number of warm-up steps.
        unpaired: Relative noise of the difference of two arms, see `UNPAIRED`. By default it is measured in
            the recorded races, if there are any.

    Raises:
        ValueError: If the search does not fit in the run, or the record ends before the search begins or has
            too few losses for it.
    """
    if unpaired is not None and not unpaired >= 0:
        raise ValueError(f"--unpaired={unpaired}: must be at least 0")
    plan = settings.resolve(train_iters, warmup_iters)
    if log.steps < plan.search_start:
        raise ValueError(
            f"{log.source}: ends at step {log.steps}, before the search begins at step {plan.search_start}"
        )
    within = log.losses[plan.search_start // log.interval : plan.search_end // log.interval]
    if not np.isfinite(log.losses).any():
        raise ValueError(f"{log.source}: contains no finite loss")
    executed, interruptions = _executed(log)
    share = _share(unpaired, executed)
    on_points = _on_points(settings, plan, log.interval)
    shared: dict[str, Any] = {"warmup_iters": warmup_iters // log.interval, "unpaired": share}
    points = train_iters // log.interval
    followed: dict[str, Any] = {"executed": executed, "interruptions": interruptions}
    runs = {
        arms: replay(on_points, points, log.losses, arms=arms, **shared, **followed)
        for arms in ARMS[settings.mode]
    }
    if executed and all(one.recorded for one in runs[Arms.EQUAL].decisions):
        runs = {Arms.EQUAL: runs[Arms.EQUAL]}
    return Report(
        mode=settings.mode,
        source=log.source,
        train_iters=train_iters,
        interval=log.interval,
        plan=settings.describe(plan),
        noise=_known(deviation(within)),
        unpaired=share,
        basis=_basis(log, settings.mode, bool(executed), runs[Arms.EQUAL].decisions),
        scenarios=tuple(_scenario(arms, run, log.interval) for arms, run in runs.items()),
        lengths=tuple(_lengths(on_points, factor, points, log, shared) for factor in LENGTH_FACTORS),
    )


def _on_points(settings: AdaLRSSettings, plan: Any, interval: int) -> AdaLRSSettings:
    """Return the settings with all lengths in recorded points, which are `interval` steps apart."""
    if interval == 1:
        return settings
    try:
        return with_lengths(settings, plan, 1 / interval)
    except ValueError as error:
        raise ValueError(
            f"one loss every {interval} steps is too coarse for this search: in recorded losses, {error}"
        ) from None


def _executed(log: LossLog) -> tuple[list[Executed], set[int]]:
    """Return the executed steps and interruptions of a run with a search; both are empty without a search."""
    if log.run is None or log.run.config.get("adalrs", {}).get("mode", "off") == "off":
        return [], set()
    columns = (getattr(log.run.train, name).tolist() for name in Executed._fields)
    interruptions = {
        decision.total_steps for decision in log.run.decisions if decision.event == "interrupted"
    }
    return [Executed(*row) for row in zip(*columns, strict=True)], interruptions


def _share(asked: float | None, executed: Sequence[Executed]) -> float:
    if asked is not None:
        return asked
    own = unpaired_share(executed)
    return own if math.isfinite(own) else UNPAIRED


def _basis(log: LossLog, mode: str, is_followed: bool, decisions: Sequence[Replayed]) -> str:
    known = sum(one.recorded for one in decisions)
    if is_followed and known and log.run:
        text = (
            f"the recorded steps, including undone ones, for the first {known} of {len(decisions)} decisions"
        )
        if log.run.config["adalrs"].get("mode") == mode:
            differs = differences(decisions, log.run.decisions)
            text += f", but {differs}" if differs else ", which agree with the journal"
        return (
            text
            if known == len(decisions)
            else f"{text}; for later decisions, every arm is assumed to have the kept losses"
        )
    text = (
        "one loss per step, so the losses of trials are not recorded. Decisions marked assumed are based on "
        "the assumption that every arm has the recorded loss"
    )
    if log.interval > 1:
        text += (
            f"; one loss every {log.interval} steps: each is used as the mean of these steps. If it is the "
            f"loss of a single step, errors in a run are up to {math.sqrt(log.interval):.1f} times smaller"
        )
    return text


def _scenario(arms: Arms, run: Replay, interval: int) -> Scenario:
    rows = tuple(_row(one, interval) for one in run.decisions)
    return Scenario(arms.value, run.scale, run.discarded * interval, run.finished, rows)


def _row(one: Replayed, interval: int) -> Row:
    decision = one.decision
    is_speed = decision.velocity is not None or decision.reference_velocity is not None

    def per_step(value: float | None) -> float | None:
        return None if value is None else value / interval

    aborted = decision.event is Event.ABORTED
    return Row(
        executed=one.total_steps * interval,
        step=(decision.step or 0) * interval,
        event=decision.event.value if decision.event else "",
        scale_before=decision.scale_before,
        scale_after=decision.scale_after,
        noise=_known(one.noise),
        velocity=per_step(decision.velocity),
        error=per_step(decision.error),
        reference_velocity=per_step(decision.reference_velocity),
        gain=_known(decision.gain),
        gain_error=_known(decision.gain_error),
        threshold=per_step(decision.threshold) if is_speed and not aborted else _known(decision.threshold),
        discarded_steps=decision.discarded_steps * interval,
        recorded=one.recorded,
        reason=decision.reason,
    )


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _lengths(
    settings: AdaLRSSettings, factor: float, points: int, log: LossLog, shared: Mapping[str, Any]
) -> Lengths:
    plan = settings.resolve(points, shared["warmup_iters"])
    steps = {
        name: round(factor * length) * log.interval
        for name, length in lengths_in_steps(settings, plan).items()
    }
    try:
        run = replay(with_lengths(settings, plan, factor), points, log.losses, **shared)
    except ValueError:
        return Lengths(steps)
    measured = _Measured(run)
    return replace(
        measured.windows(steps) if settings.mode == "paper" else measured.races(steps),
        discarded_steps=run.discarded * log.interval,
    )


class _Measured:
    """Precision of the comparisons of a replay, measured on its decisions."""

    def __init__(self, run: Replay) -> None:
        self._run = run

    def windows(self, steps: Mapping[str, int]) -> Lengths:
        """Return the precision of the windows of paper mode."""
        decisions = [
            one.decision for one in self._run.of(Event.WINDOW, Event.TRIAL_STARTED, Event.SEARCH_ENDED)
        ]
        speeds = [(one.velocity, one.error) for one in decisions if one.velocity and one.error]
        trials = len(self._run.of(Event.TRIAL_STARTED))
        if not speeds:
            return Lengths(steps, 0, trials)
        signal = median(v / e for v, e in speeds)
        typical = abs(median(v for v, _ in speeds))
        least = 2 * median(e for _, e in speeds) / typical if typical else None
        return Lengths(steps, len(speeds), trials, signal, least)

    def races(self, steps: Mapping[str, int]) -> Lengths:
        """Return the precision of full races; the thresholds of the climb do not depend on the noise."""
        gains, trials, began_at = [], 0, 0
        for decision in (one.decision for one in self._run.decisions):
            if decision.event is Event.TRIAL_STARTED:
                trials, began_at = trials + 1, decision.step or 0
            elif decision.event in (Event.FAILED, Event.ACCEPTED) and began_at >= self._run.plan.search_start:
                gains += [decision.threshold] if decision.threshold is not None else []
        return Lengths(steps, len(gains), trials, None, median(gains) if gains else None)


def as_json(reports: Mapping[str, Report], refused: Sequence[str]) -> dict[str, Any]:
    """Return the reports by mode, and the reasons for the modes without one, as JSON values."""
    return {mode: asdict(one) for mode, one in reports.items()} | {"refused": list(refused)}
