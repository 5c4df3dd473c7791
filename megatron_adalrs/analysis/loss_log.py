"""Reader of recorded training losses.

Supported are CSV files, JSON-lines files, TensorBoard folders and the output folders of this package.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_adalrs.metrics.run_log import RunLog, read_run

_STEPS = ("step", "iteration", "iter", "global_step", "_step", "steps", "iterations", "train/global_step")
_LOSSES = (
    "train/loss",
    "train_loss",
    "training_loss",
    "loss",
    "lm loss",
    "lm_loss",
    "train/lm_loss",
    "value",
)
_NOT_TRAINING = ("val", "eval", "test", "__min", "__max", "scale")


@dataclass(frozen=True)
class LossLog:
    """Recorded losses at a constant interval."""

    source: str
    """Name of the file and column, for messages."""
    losses: NDArray[np.float64]
    """Loss of step (i + 1) * interval at index i, in nats; NaN where the record has NaN or no value."""
    interval: int
    """Number of steps between two losses."""
    run: RunLog | None = None
    """Complete log, if a run of this package wrote it; `losses` are then those of its kept steps."""

    @property
    def steps(self) -> int:
        """The last step on record."""
        return len(self.losses) * self.interval


def read_loss_log(path: Path, column: str | None = None, tag: str | None = None) -> LossLog:
    """Read a training loss.

    Args:
        path: A CSV file with column names in the first line, a JSON-lines file with one object per line, a
            folder with TensorBoard event files, or the output folder (or `metrics.jsonl`) of this package.
        column: Column or key of the loss; by default it is recognized by its name.
        tag: TensorBoard tag of the loss; by default it is recognized by its name.

    Raises:
        OSError: If the file does not exist or cannot be read.
        ValueError: If there is no loss, the loss column is ambiguous, or a value is not a number.
    """
    is_run = path.name == "metrics.jsonl" or (path / "metrics.jsonl").is_file()
    if column is not None and (is_run or path.is_dir()):
        raise ValueError(f"--column={column}: is only for CSV and JSON-lines files, and {path} is neither")
    if tag is not None and (is_run or path.is_file()):
        raise ValueError(
            f"--tag={tag}: is only for a folder with TensorBoard files and no metrics.jsonl, not {path}"
        )
    if is_run:
        return _read_run(path if path.is_dir() else path.parent)
    if path.is_dir():
        return _on_grid(*_read_tensorboard(path, tag))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if not text.strip():
        raise ValueError(f"{path}: is empty")
    read = _read_json_lines if text.lstrip().startswith("{") else _read_csv
    return _on_grid(*read(path, text, column))


def _read_run(folder: Path) -> LossLog:
    run = read_run(folder)
    kept = run.train.kept
    if not kept.any():
        raise ValueError(f"{folder}: contains no training step")
    losses = np.full(int(run.train.step[kept].max()), math.nan)
    losses[run.train.step[kept] - 1] = run.train.loss[kept]
    return LossLog(f"{folder}, kept steps", losses, 1, run)


def _read_csv(path: Path, text: str, column: str | None) -> tuple[str, list[int], list[float]]:
    lines = text.splitlines()
    separator = max(",\t;", key=lines[0].count)
    rows = list(csv.reader(lines, delimiter=separator))
    names = [name.strip() for name in rows[0]]
    first = 1
    if all(_number(name) is not None for name in names):  # no header line: columns are named by number
        names, first = [str(index + 1) for index in range(len(names))], 0
        column = column or (names[0] if len(names) == 1 else None)
    cells = [dict(zip(names, row, strict=False)) for row in rows[first:]]
    numbered = [(f"{path}:{index}", row) for index, row in enumerate(cells, start=first + 1) if row]
    return _columns(path, numbered, names, column)


def _read_json_lines(path: Path, text: str, column: str | None) -> tuple[str, list[int], list[float]]:
    rows: list[tuple[str, Mapping[str, Any]]] = []
    names: dict[str, None] = {}
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # the process ended while it wrote this line
            raise ValueError(f"{path}:{number}: not valid JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: must be an object with a loss, not {type(row).__name__}")
        if row.get("kind", "train") == "train":
            rows.append((f"{path}:{number}", row))
            names |= dict.fromkeys(row)
    if {"phase", "total_steps"} <= names.keys():
        raise ValueError(
            f"{path}: contains undone steps: give the output folder of that run, or its metrics.jsonl"
        )
    return _columns(path, rows, list(names), column)


def _read_tensorboard(folder: Path, tag: str | None) -> tuple[str, list[int], list[float]]:
    if not any(folder.glob("events.out.tfevents*")):
        below = sorted({str(file.parent) for file in folder.rglob("events.out.tfevents*")})
        hint = f"; there are some in {', '.join(below[:5])}" if below else ""
        raise ValueError(f"{folder}: contains neither metrics.jsonl nor TensorBoard event files{hint}")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tag = _chosen(folder, events.Tags()["scalars"], tag, "tag")
    scalars = events.Scalars(tag)
    return f"{folder}, {tag}", [point.step for point in scalars], [point.value for point in scalars]


def _columns(
    path: Path, rows: Sequence[tuple[str, Mapping[str, Any]]], names: Sequence[str], column: str | None
) -> tuple[str, list[int], list[float]]:
    """Return the source, steps and losses; rows without a value in the loss column are skipped."""
    lower = {name.lower(): name for name in reversed(names)}
    counted = next((lower[name] for name in _STEPS if name in lower), None)
    column = _chosen(path, [name for name in names if name != counted], column, "column")
    steps: list[int] = []
    losses: list[float] = []
    for place, row in rows:
        if column not in row or row[column] == "":
            continue
        loss = _number(row[column])
        if loss is None:
            raise ValueError(f"{place}: {column}: {row[column]!r} must be a number")
        step = float(len(steps) + 1) if counted is None else _number(row.get(counted))
        if step is None or not step.is_integer() or step < 0:
            raise ValueError(
                f"{place}: {counted}: {row.get(counted or '')!r} must be a whole number of steps"
            )
        steps.append(int(step))
        losses.append(loss)
    return f"{path}, {column}", steps, losses


def _chosen(path: Path, names: Sequence[str], asked: str | None, kind: str) -> str:
    there = f"it has {', '.join(names[:30])}" if names else "it has none"
    if asked is not None:
        if asked not in names:
            raise ValueError(f"--{kind}={asked}: {path} has no such {kind}; {there}")
        return asked
    lower = {name.lower(): name for name in reversed(names)}
    for name in _LOSSES:
        if name in lower:
            return lower[name]
    like = [
        name for name in names if "loss" in name.lower() and not any(n in name.lower() for n in _NOT_TRAINING)
    ]
    if len(like) != 1:
        which = f"{len(like)} {kind}s could be" if like else f"no {kind} is recognized as"
        raise ValueError(f"{path}: {which} the training loss: choose one with --{kind}; {there}")
    return like[0]


def _number(value: object) -> float | None:
    """Return a value as a float, NaN for None (NaN in JSON), or None if it is not a number."""
    if value is None:
        return math.nan
    try:
        return None if isinstance(value, bool) else float(value)  # type: ignore[arg-type]  # TypeError is handled
    except (TypeError, ValueError):
        return None


def _on_grid(source: str, steps: Iterable[int], losses: Iterable[float]) -> LossLog:
    """Return the losses at a constant interval; of repeated steps, as after a resume, the last one counts."""
    at = dict(zip(steps, losses, strict=True))
    if len(at) < 2:
        raise ValueError(f"{source}: contains {len(at)} loss(es), at least 2 are required")
    order = np.array(sorted(at))
    distances, counts = np.unique(np.diff(order), return_counts=True)
    interval = int(distances[counts.argmax()])
    first = int(order[0]) if order[0] < interval else interval
    points = np.rint((order - first) / interval).astype(int)
    values = np.full(points[-1] + 1, math.nan)
    values[points] = [at[step] for step in order.tolist()]
    return LossLog(source, values, interval)
