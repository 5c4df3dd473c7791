"""Reader of a run directory: `metrics.jsonl`, `decisions.jsonl` and `config.yaml`.

`step` counts the optimizer steps that the run has kept, `total_steps` all that it executed. When an AdaLRS
trial is undone, `step` returns to the start of the trial and `total_steps` does not; when a process resumes,
both return to the values of its checkpoint.
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

from megatron_adalrs.metrics.json_lines import read_records
from megatron_adalrs.metrics.kept_steps import LOSS_GUARD, Trial, find_trials, kept_steps
from megatron_adalrs.metrics.records import (
    DECISIONS_LINE,
    METRICS_LINE,
    CorporaUse,
    DecisionRecord,
    Evaluation,
    MetricsRecord,
    RunEvent,
    TrainStep,
)


@dataclass(frozen=True)
class TrainSeries:
    """1-D arrays with one entry per executed optimizer step, in the order of execution.

    A value that was not recorded, or recorded as null, is NaN.
    """

    step: NDArray[np.int64]
    """Kept steps, this one included; not monotonic, since undoing a trial decreases it."""
    total_steps: NDArray[np.int64]
    """Executed steps, this one included; increasing."""
    loss: NDArray[np.float64]
    """Nats per token; may be NaN or infinite."""
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
    """False if the optimizer skipped the update, for example after an overflow."""
    kept: NDArray[np.bool_]
    """False if a later decision undid the step."""


@dataclass(frozen=True)
class Totals:
    """Steps, tokens and seconds of a run."""

    useful_steps: int
    discarded_steps: int
    """Steps of undone trials."""
    lost_steps: int
    """Steps after the checkpoint that a later process resumed from; not part of total_steps."""
    useful_tokens: int
    discarded_tokens: int
    snapshot_seconds: float
    wall_seconds: float
    """Sum over processes of the time from first to last record, without the time between two processes."""

    @property
    def total_steps(self) -> int:
        return self.useful_steps + self.discarded_steps

    @property
    def total_tokens(self) -> int:
        return self.useful_tokens + self.discarded_tokens


@dataclass(frozen=True)
class RunLog:
    """Records of a run."""

    path: Path
    config: Mapping[str, Any]
    """Content of config.yaml; empty if there is no such file."""
    train: TrainSeries
    evaluations: tuple[Evaluation, ...]
    """Evaluations of weights that are part of the final run."""
    corpora: CorporaUse | None
    """Consumption of the training corpora, as last recorded."""
    decisions: tuple[DecisionRecord, ...]
    events: tuple[RunEvent, ...]
    trials: tuple[Trial, ...]
    scale: float
    """AdaLRS scale of the learning rate after the last record."""
    totals: Totals

    @property
    def evaluated_corpora(self) -> list[str]:
        """Splits of single corpora, SPLIT/NAME, for splits with several corpora; validation comes first."""
        splits = dict.fromkeys(evaluation.split for evaluation in self.evaluations if "/" in evaluation.split)
        return sorted(splits, key=lambda split: split.startswith("test/"))


def read_run(path: str | os.PathLike[str]) -> RunLog:
    """Read the records of the run in the directory `path`, without the steps that a resume replaced.

    Raises:
        OSError: If `path` is not a directory, or contains no metrics.jsonl.
        ValueError: If a line (named by file and number) does not have the format, config.yaml is malformed,
            or no step was recorded yet. An incomplete last line is not an error.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such run directory")
    if not path.is_dir():
        raise NotADirectoryError(f"{path}: required a run directory, but this is a file")
    file = path / "metrics.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{path}: not a run directory, it contains no metrics.jsonl")

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
    trials = list(find_trials(decisions, metrics.last_total_step))
    train = _train_series(metrics.train, decisions)
    return RunLog(
        path=path,
        config=_read_config(path / "config.yaml"),
        train=train,
        evaluations=tuple(_kept_evaluations(metrics.evaluations, train)),
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
    """Valid records of metrics.jsonl: a starting process invalidates those after its checkpoint."""

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
                self._drop_after(record)
                previous_time = None
            if previous_time is not None:
                self.wall_seconds += max(0.0, record.time - previous_time)
            previous_time = record.time
            self._add(record)

    @property
    def latest(self) -> list[MetricsRecord]:
        """The last record of each kind of record."""
        return [records[-1] for records in (self.train, self.evaluations, self.events) if records]

    @property
    def last_total_step(self) -> int:
        return max((record.total_steps for record in self.latest), default=0)

    def _drop_after(self, start: RunEvent) -> None:
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


def _kept_evaluations(evaluations: Sequence[Evaluation], train: TrainSeries) -> Iterator[Evaluation]:
    """Yield the evaluations whose step, as it was finally kept, had been executed by then."""
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
    return TrainSeries(**columns, kept=kept_steps(columns["step"], columns["total_steps"], decisions))


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
        raise ValueError(f"{file}: required a mapping of fields, not {type(config).__name__}")
    return config
