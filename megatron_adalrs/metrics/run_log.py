"""Reads back what a run wrote about itself: `metrics.jsonl`, `decisions.jsonl` and `config.yaml`.

`step` counts the optimizer steps a run has kept, `total_steps` all it executed. An AdaLRS trial that is
undone takes `step` back while `total_steps` goes on; a resumed process takes both back, to its checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from megatron_adalrs.metrics.records import (
    DECISIONS_LINE,
    METRICS_LINE,
    CorporaUse,
    DecisionRecord,
    Evaluation,
    MetricsRecord,
    RunEvent,
    TrainStep,
    read_records,
)

UNDOING_VERDICTS = frozenset({"failed", "neutral", "aborted", "interrupted"})
"""Ends of a trial that restore the snapshot from its start."""
LOSS_GUARD = "loss_guard"
"""How events begin that are not a search's. The snapshots to rewind to are not in the journal: what was
undone are the last steps before the event."""
RUNNING = "running"
"""Verdict of a trial that has not ended."""


@dataclass(frozen=True)
class TrainSeries:
    """One row per executed optimizer step, in the order of execution; 1-D arrays of one length.

    What was not recorded, or recorded as null, is NaN.
    """

    step: NDArray[np.int64]
    """Kept steps, this one included; not monotonic: it goes back when a trial is undone."""
    total_steps: NDArray[np.int64]
    """Executed steps, this one included; increasing."""
    loss: NDArray[np.float64]
    """Nats per token; NaN and infinity are left as they are."""
    lr: NDArray[np.float64]
    scale: NDArray[np.float64]
    grad_norm: NDArray[np.float64]
    tokens_per_second: NDArray[np.float64]
    flops_per_second: NDArray[np.float64]
    seconds: NDArray[np.float64]
    memory_bytes: NDArray[np.float64]
    consumed_tokens: NDArray[np.int64]
    """Tokens of the kept steps up to this one."""
    discarded_tokens: NDArray[np.int64]
    """Tokens of the trials undone before this step."""
    time: NDArray[np.float64]
    """Unix time in seconds."""
    phase: NDArray[np.str_]
    applied: NDArray[np.bool_]
    """False where the optimizer skipped the update, for example after an overflow."""
    kept: NDArray[np.bool_]
    """False where a later decision undid the step."""


@dataclass(frozen=True)
class Trial:
    """Executed steps first_total_step..last_total_step (inclusive) at another scale, from start_step on."""

    start_step: int
    first_total_step: int
    last_total_step: int
    verdict: str
    scale_before: float
    scale_trial: float
    scale_after: float

    @property
    def length(self) -> int:
        return self.last_total_step - self.first_total_step + 1


@dataclass(frozen=True)
class Totals:
    useful_steps: int
    discarded_steps: int
    """Steps of undone trials."""
    lost_steps: int
    """Steps beyond the checkpoint that a later process resumed from; not part of total_steps."""
    useful_tokens: int
    discarded_tokens: int
    snapshot_seconds: float
    wall_seconds: float
    """First to last record of each process, summed: the wait between two processes is not counted."""

    @property
    def total_steps(self) -> int:
        return self.useful_steps + self.discarded_steps

    @property
    def total_tokens(self) -> int:
        return self.useful_tokens + self.discarded_tokens


@dataclass(frozen=True)
class RunLog:
    path: Path
    config: Mapping[str, Any]
    """As in config.yaml, the group `adalrs` nested; empty when there is no such file."""
    train: TrainSeries
    evaluations: tuple[Evaluation, ...]
    """Those of weights that the run consists of in the end."""
    corpora: CorporaUse | None
    """What the last record knows of the corpora that were consumed."""
    decisions: tuple[DecisionRecord, ...]
    events: tuple[RunEvent, ...]
    trials: tuple[Trial, ...]
    scale: float
    """What AdaLRS multiplied the learning rate by, after the last record."""
    totals: Totals

    @property
    def evaluated_corpora(self) -> list[str]:
        """Splits of single corpora, PART/NAME, where a part of the data has several; the validation's
        first."""
        splits = dict.fromkeys(evaluation.split for evaluation in self.evaluations if "/" in evaluation.split)
        return sorted(splits, key=lambda split: split.startswith("test/"))


def read_run(path: str | os.PathLike[str]) -> RunLog:
    """Everything that the run in the directory `path` recorded, without the work that a resume made void.

    Raises:
        OSError: `path` is not a directory, or holds no metrics.jsonl.
        ValueError: a line (named by file and number) is not what the format says, config.yaml is broken, or
            no step was recorded yet. A last line cut off while it was written is not an error.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such run directory")
    if not path.is_dir():
        raise NotADirectoryError(f"{path}: a run directory is required, this is a file")
    file = path / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{path}: not a run directory, it holds no metrics.jsonl")

    metrics = _Metrics(read_records(file, METRICS_LINE))
    if not metrics.train and not metrics.evaluations:
        raise ValueError(f"{file}: no training step and no evaluation recorded yet")
    journal = path / "decisions.jsonl"
    decisions = [
        decision
        for decision in (read_records(journal, DECISIONS_LINE) if journal.is_file() else ())
        if not any(
            decision.time <= start.time and decision.total_steps > start.total_steps
            for start in metrics.starts
        )
    ]
    trials = list(_trials(decisions, metrics.last_total_step))
    train = _train_series(metrics.train, decisions)
    return RunLog(
        path=path,
        config=_read_config(path / "config.yaml"),
        train=train,
        evaluations=tuple(_of_kept_weights(metrics.evaluations, train)),
        corpora=metrics.corpora[-1] if metrics.corpora else None,
        decisions=tuple(decisions),
        events=tuple(metrics.events),
        trials=tuple(trials),
        scale=_last_scale(metrics.train, decisions),
        totals=_totals(metrics, decisions, train),
    )


_DTYPES = {"phase": np.str_, "applied": np.bool_} | dict.fromkeys(
    ("step", "total_steps", "consumed_tokens", "discarded_tokens"), np.int64
)


class _Metrics:
    """The records of metrics.jsonl that count: a process that starts makes void what its checkpoint lacks."""

    def __init__(self, records: Iterable[MetricsRecord]) -> None:
        self.train: list[TrainStep] = []
        self.evaluations: list[Evaluation] = []
        self.corpora: list[CorporaUse] = []
        self.events: list[RunEvent] = []
        self.starts: list[RunEvent] = []
        self.lost_steps = 0
        self.wall_seconds = 0.0
        previous_time: float | None = None
        for record in records:
            if isinstance(record, RunEvent) and record.event in ("start", "resume"):
                self._go_back(record)
                previous_time = None
            if previous_time is not None:
                self.wall_seconds += max(0.0, record.time - previous_time)
            previous_time = record.time
            self._add(record)

    @property
    def latest(self) -> list[MetricsRecord]:
        """The last record of each kind."""
        return [records[-1] for records in (self.train, self.evaluations, self.events) if records]

    @property
    def last_total_step(self) -> int:
        return max((record.total_steps for record in self.latest), default=0)

    def _go_back(self, start: RunEvent) -> None:
        self.lost_steps += max(0, self.last_total_step - start.total_steps)
        for records in (self.train, self.evaluations, self.corpora, self.events):
            while records and records[-1].total_steps > start.total_steps:
                records.pop()
        self.starts.append(start)

    def _add(self, record: MetricsRecord) -> None:
        if isinstance(record, TrainStep):
            self.train.append(record)
        elif isinstance(record, Evaluation):
            self.evaluations.append(record)
        elif isinstance(record, CorporaUse):
            self.corpora.append(record)
        else:
            self.events.append(record)


def _trials(decisions: Sequence[DecisionRecord], last_total_step: int) -> Iterator[Trial]:
    opened: DecisionRecord | None = None

    def trial(opened: DecisionRecord, last: int, verdict: str, scale_after: float) -> Trial:
        scales = (opened.scale_before, opened.scale_after, scale_after)
        return Trial(opened.step, opened.total_steps + 1, last, verdict, *scales)

    for decision in decisions:
        if decision.event == "trial_started":
            opened = decision
        elif opened is not None and decision.event in UNDOING_VERDICTS | {"accepted"}:
            yield trial(opened, decision.total_steps, decision.event, decision.scale_after)
            opened = None
    if opened is not None:
        yield trial(opened, last_total_step, RUNNING, opened.scale_after)


def _of_kept_weights(evaluations: Sequence[Evaluation], train: TrainSeries) -> Iterator[Evaluation]:
    """Those whose step, as it was kept in the end, had been executed by then."""
    executed_at = dict(
        zip(train.step[train.kept].tolist(), train.total_steps[train.kept].tolist(), strict=True)
    )
    for evaluation in evaluations:
        if executed_at.get(evaluation.step, 0) <= evaluation.total_steps:
            yield evaluation


def _train_series(rows: Sequence[TrainStep], decisions: Sequence[DecisionRecord]) -> TrainSeries:
    columns: dict[str, NDArray[Any]] = {}
    for column in fields(TrainSeries):
        if column.name != "kept":
            dtype = _DTYPES.get(column.name, np.float64)
            columns[column.name] = np.array([getattr(row, column.name) for row in rows], dtype=dtype)
    return TrainSeries(**columns, kept=_kept(columns["step"], columns["total_steps"], decisions))


def _kept(
    step: NDArray[np.int64], total_steps: NDArray[np.int64], decisions: Sequence[DecisionRecord]
) -> NDArray[np.bool_]:
    """Which executed steps the run consists of in the end: snapshots were taken of it, and it went back to
    them.

    A step that a later one took the place of, for which the journal has no reason, does not count either.
    """
    history: list[tuple[int, int]] = []  # executed steps (first, last] that the run consists of
    since = 0
    captured: dict[str, list[tuple[int, int]]] = {}
    for decision in decisions:
        if decision.capture is not None:
            captured[decision.capture] = [*history, (since, decision.total_steps)]
        if decision.event.startswith(LOSS_GUARD):
            end = decision.total_steps - decision.discarded_steps
            parts = [*history, (since, decision.total_steps)]
            history, since = (
                [(first, min(last, end)) for first, last in parts if first < end],
                decision.total_steps,
            )
        elif decision.restore is not None:
            history, since = captured.get(decision.restore, history), decision.total_steps
    kept = np.zeros(total_steps.shape, dtype=np.bool_)
    for first, last in [*history, (since, np.iinfo(np.int64).max)]:
        kept |= (total_steps > first) & (total_steps <= last)
    candidates = np.flatnonzero(kept)
    later_minimum = np.minimum.accumulate(step[candidates][::-1])[::-1]
    kept[candidates[:-1][step[candidates[:-1]] >= later_minimum[1:]]] = False
    return kept


def _last_scale(train: Sequence[TrainStep], decisions: Sequence[DecisionRecord]) -> float:
    if decisions and (not train or decisions[-1].total_steps >= train[-1].total_steps):
        return decisions[-1].scale_after
    return train[-1].scale if train else 1.0


def _totals(metrics: _Metrics, decisions: Sequence[DecisionRecord], train: TrainSeries) -> Totals:
    position = max([*decisions[-1:], *metrics.latest], key=lambda record: (record.total_steps, record.time))
    useful_tokens = int(train.consumed_tokens[train.kept][-1]) if train.kept.any() else 0
    executed_tokens = int(train.consumed_tokens[-1] + train.discarded_tokens[-1]) if train.kept.size else 0
    return Totals(
        useful_steps=position.step,
        discarded_steps=position.total_steps - position.step,
        lost_steps=metrics.lost_steps,
        useful_tokens=useful_tokens,
        discarded_tokens=executed_tokens - useful_tokens,
        snapshot_seconds=sum(
            d.snapshot_seconds or 0.0 for d in decisions if not d.event.startswith(LOSS_GUARD)
        ),
        wall_seconds=metrics.wall_seconds,
    )


def _read_config(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: must hold a mapping of fields, not {type(config).__name__}")
    return config
