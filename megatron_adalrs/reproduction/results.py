"""Results of complete runs: reading, storing and comparing them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_adalrs.adalrs.slope import RunningSlope
from megatron_adalrs.metrics.run_log import RunLog, read_run
from megatron_adalrs.reproduction.plan import Run, Settings
from megatron_adalrs.utils.atomic_files import atomic_write

SEARCH_WINDOW = (0.1, 0.4)
"""Default search range, as shares of a run."""


@dataclass(frozen=True)
class Result:
    """Figures of one run. Losses are in nats per token, and infinite if the run diverged."""

    run: Run
    name: str
    command: str
    train_iters: int
    valid: float
    """Validation loss at the end."""
    scale: float
    """Factor by which the search multiplied the learning rate."""
    discarded_steps: int
    snapshot_seconds: float
    wall_seconds: float
    curve: tuple[tuple[int, float], ...]
    """Validation losses of kept weights, each with the number of executed steps, discarded ones included."""
    velocity: float
    """Minus the least-squares slope of the training loss over the kept steps in `SEARCH_WINDOW`, in nats per
    step."""
    velocity_error: float
    """Standard error of the velocity."""
    window_loss: float
    """Mean training loss over the same steps."""
    step_seconds: float
    """Median duration of a step."""

    @property
    def discarded(self) -> float:
        """Discarded steps as a share of train_iters."""
        return self.discarded_steps / self.train_iters


class Results:
    """A set of results with queries."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.all = list(results)

    def of(
        self, study: str, schedule: str, method: str, lr: float | None = None, settings: Settings = ()
    ) -> dict[int, Result]:
        """Return the matching results by seed."""
        return {
            result.run.seed: result
            for result in self.all
            if (result.run.study, result.run.schedule, result.run.method) == (study, schedule, method)
            and (lr is None or result.run.lr == lr)
            and result.run.settings == settings
        }

    def rates(self, study: str, schedule: str, method: str = "fixed") -> list[float]:
        """Return the initial learning rates of the matching results, in order."""
        runs = [result.run for result in self.all]
        return sorted(
            {run.lr for run in runs if (run.study, run.schedule, run.method) == (study, schedule, method)}
        )

    def best_rate(self, study: str, schedule: str, among: Sequence[float] | None = None) -> float:
        """Return the fixed rate with the lowest mean of the final validation losses.

        Args:
            study: Name of the study.
            schedule: Learning-rate schedule.
            among: Rates to choose from. Default: all.

        Raises:
            ValueError: No fixed rate ended with a finite loss.
        """
        losses = {
            lr: fmean(result.valid for result in self.of(study, schedule, "fixed", lr).values())
            for lr in (among or self.rates(study, schedule))
            if self.of(study, schedule, "fixed", lr)
        }
        finite = {lr: loss for lr, loss in losses.items() if math.isfinite(loss)}
        if not finite:
            raise ValueError(
                f"{study}, {schedule}: no run at a fixed rate ended with a finite loss to compare with"
            )
        return min(finite, key=finite.__getitem__)


def differences(results: Mapping[int, Result], references: Mapping[int, Result]) -> list[float]:
    """Return the final validation losses minus those of the references with the same seeds."""
    return [result.valid - references[seed].valid for seed, result in results.items() if seed in references]


def steps_to_reach(result: Result, loss: float) -> float | None:
    """Return how many steps a run executed until its validation loss was at or below `loss`.

    Discarded steps count. The loss is interpolated linearly between two evaluations.

    Returns:
        The number of steps, or None if the run never reached the loss.
    """
    before: tuple[int, float] | None = None
    for steps, value in result.curve:
        if value <= loss:
            if before is None or not math.isfinite(before[1]):
                return float(steps)
            return before[0] + (steps - before[0]) * (before[1] - loss) / (before[1] - value)
        before = steps, value
    return None


def is_complete(run_dir: Path) -> bool:
    """Return whether a run has reached its end."""
    file = run_dir / "metrics.jsonl"
    try:
        last = file.read_bytes().rstrip(b"\n").rsplit(b"\n", 1)[-1]
        return bool(json.loads(last).get("event") == "end")
    except (OSError, ValueError, AttributeError):
        return False


def collect(run: Run, run_dir: Path, command: str) -> Result:
    """Read the records of a complete run and write its result.json.

    Raises:
        OSError: The records cannot be read.
        ValueError: The records are damaged, or the run was never evaluated.
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
    """Read a result that `collect` has written.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        values: dict[str, Any] = json.loads(file.read_bytes())
        run = values.pop("run")
        run["settings"] = tuple((name, value) for name, value in run["settings"])
        curve = tuple((int(steps), float(loss)) for steps, loss in values.pop("curve"))
        return Result(run=Run(**run), curve=curve, **values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: not a result of this program: {error}; remove it to collect the run again"
        ) from None


def _search_window(log: RunLog, train_iters: int) -> tuple[float, float, float]:
    """Return velocity, its standard error and mean loss in the search window; NaN if there are no steps."""
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
