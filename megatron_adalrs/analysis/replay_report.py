"""A replay in numbers, and how it looks on a terminal."""

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
    """A decision; steps and velocities are those of the run, whatever the distance of the points on
    record."""

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
    """A search from end to end, trials taken to show what `arms` says."""

    arms: str
    scale: float
    discarded_steps: int
    finished: bool
    decisions: tuple[Row, ...]


@dataclass(frozen=True)
class Lengths:
    """What windows or races of other lengths could tell on this record. None: they do not fit in the run."""

    steps: Mapping[str, int]
    comparisons: int | None = None
    """Windows, or races."""
    trials: int | None = None
    signal: float | None = None
    """Paper: median of velocity / error."""
    least: float | None = None
    """Paper: smallest change of velocity that a trial can tell, in parts of the velocity; robust: smallest
    gain, in nats. Medians."""
    discarded_steps: int | None = None


@dataclass(frozen=True)
class Report:
    mode: str
    source: str
    train_iters: int
    interval: int
    plan: str
    noise: float | None
    """Standard deviation of a single loss about a line, within the search, in nats."""
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
    """Everything that this program tells about one mode.

    Raises:
        ValueError: the search does not fit in the run, or the record ends before it begins or is too coarse
            for it.
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
        raise ValueError(f"{log.source}: holds no finite loss")
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
        plan=str(plan),
        noise=_known(deviation(within)),
        unpaired=share,
        basis=_basis(log, settings.mode, bool(executed), runs[Arms.EQUAL].decisions),
        scenarios=tuple(_scenario(arms, run, log.interval) for arms, run in runs.items()),
        lengths=tuple(_lengths(on_points, factor, points, log, shared) for factor in LENGTH_FACTORS),
    )


def _on_points(settings: AdaLRSSettings, plan: Any, interval: int) -> AdaLRSSettings:
    """The search on points `interval` steps apart as if they were steps."""
    if interval == 1:
        return settings
    try:
        return with_lengths(settings, plan, 1 / interval)
    except ValueError as error:
        raise ValueError(
            f"one loss every {interval} steps is too coarse for this search: in points, {error}"
        ) from None


def _executed(log: LossLog) -> tuple[list[Executed], set[int]]:
    """The executed steps of a run with a search, and where it was interrupted; nothing of any other."""
    if log.run is None or not log.run.config.get("adalrs", {}).get("enabled"):
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
            f"the run's own steps, undone ones included, for the first {known} of {len(decisions)} decisions"
        )
        if log.run.config["adalrs"].get("mode") == mode:
            differs = differences(decisions, log.run.decisions)
            text += f", but {differs}" if differs else ", as in its journal"
        return (
            text
            if known == len(decisions)
            else f"{text}; after those the kept losses are taken for every arm's"
        )
    text = (
        "one loss a step: what a trial would have seen is not on record. Decisions marked assumed rest on "
        "the recorded loss being what every arm would see"
    )
    if log.interval > 1:
        text += (
            f"; one loss every {log.interval} steps: each stands for a mean over them, and if it is a single "
            f"step's, errors in a run are up to {math.sqrt(log.interval):.1f} times smaller"
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
    """What the decisions of a replay say about the precision of its comparisons."""

    def __init__(self, run: Replay) -> None:
        self._run = run

    def windows(self, steps: Mapping[str, int]) -> Lengths:
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
        """Of full races: what those before them must gain is no matter of noise."""
        gains, trials, began_at = [], 0, 0
        for decision in (one.decision for one in self._run.decisions):
            if decision.event is Event.TRIAL_STARTED:
                trials, began_at = trials + 1, decision.step or 0
            elif decision.event in (Event.FAILED, Event.ACCEPTED) and began_at >= self._run.plan.search_start:
                gains += [decision.threshold] if decision.threshold is not None else []
        return Lengths(steps, len(gains), trials, None, median(gains) if gains else None)


def as_json(reports: Mapping[str, Report], refused: Sequence[str]) -> dict[str, Any]:
    """Everything, in types that json writes."""
    return {mode: asdict(one) for mode, one in reports.items()} | {"refused": list(refused)}
