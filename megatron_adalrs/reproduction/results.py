"""What a finished run comes to, as result.json beside its records."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_adalrs.adalrs.slope import RunningSlope
from megatron_adalrs.metrics.run_log import RunLog, read_run
from megatron_adalrs.reproduction.plan import Run
from megatron_adalrs.utils.atomic_files import atomic_write

SEARCH_WINDOW = (0.1, 0.4)
"""Part of a run in which a search takes place by default."""


@dataclass(frozen=True)
class Result:
    """One run. Losses are in nats per token; infinite where a run diverged."""

    run: Run
    name: str
    command: str
    train_iters: int
    valid: float
    """Validation loss at the end."""
    scale: float
    """What the search multiplied the learning rate by."""
    discarded_steps: int
    snapshot_seconds: float
    wall_seconds: float
    curve: tuple[tuple[int, float], ...]
    """Executed steps, discarded ones included, and validation loss then; of weights that the run consists
    of."""
    velocity: float
    """Minus the least-squares slope of the training loss over the kept steps in `SEARCH_WINDOW`, in nats per
    step."""
    velocity_error: float
    window_loss: float
    """Mean training loss over the same steps."""
    step_seconds: float
    """Median."""

    @property
    def discarded(self) -> float:
        """Discarded steps as a share of train_iters."""
        return self.discarded_steps / self.train_iters


def is_complete(run_dir: Path) -> bool:
    """Whether a run went to its end."""
    file = run_dir / "metrics.jsonl"
    try:
        last = file.read_bytes().rstrip(b"\n").rsplit(b"\n", 1)[-1]
        return json.loads(last).get("event") == "end"
    except (OSError, ValueError, AttributeError):
        return False


def collect(run: Run, run_dir: Path, command: str) -> Result:
    """Read a complete run and write its result.json.

    Raises:
        OSError, ValueError: its records cannot be read, or it was never evaluated.
    """
    log = read_run(run_dir)
    evaluations = [evaluation for evaluation in log.evaluations if evaluation.split == "valid"]
    if not evaluations:
        raise ValueError(f"{run_dir}: no validation loss: the run needs a validation part, see --split")
    train_iters = int(log.config["train_iters"]) if "train_iters" in log.config else log.totals.useful_steps
    velocity, error, mean = _search_window(log, train_iters)
    seconds = sorted(log.train.seconds[log.train.kept].tolist())
    result = Result(
        run=run,
        name=run_dir.name,
        command=command,
        train_iters=train_iters,
        valid=_loss(evaluations[-1].loss),
        scale=log.scale,
        discarded_steps=log.totals.discarded_steps,
        snapshot_seconds=log.totals.snapshot_seconds,
        wall_seconds=log.totals.wall_seconds,
        curve=tuple((e.total_steps, _loss(e.loss)) for e in evaluations),
        velocity=velocity,
        velocity_error=error,
        window_loss=mean,
        step_seconds=seconds[len(seconds) // 2] if seconds else math.nan,
    )
    with atomic_write(run_dir / "result.json") as stream:
        stream.write(json.dumps(asdict(result), indent=1).encode())
    return result


def load(file: Path) -> Result:
    """A result as `collect` wrote it.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        values: dict[str, Any] = json.loads(file.read_bytes())
        run = values.pop("run")
        run["settings"] = tuple((name, value) for name, value in run["settings"])
        curve = tuple((int(steps), float(loss)) for steps, loss in values.pop("curve"))
        return Result(run=Run(**run), curve=curve, **values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: not a result of this tool: {error}; remove it to collect the run anew"
        ) from None


def _search_window(log: RunLog, train_iters: int) -> tuple[float, float, float]:
    """Velocity, its standard error and the mean of the kept losses in the search window; nan where there are
    none."""
    first, last = (share * train_iters for share in SEARCH_WINDOW)
    train = log.train
    losses = train.loss[train.kept & (train.step > first) & (train.step <= last)]
    slope = RunningSlope()
    for loss in losses.tolist():
        slope.push(loss)
    mean = float(losses.mean()) if losses.size else math.nan
    return (-slope.slope, slope.error, mean) if losses.size >= 3 else (math.nan, math.nan, mean)


def _loss(value: float) -> float:
    return value if math.isfinite(value) else math.inf
