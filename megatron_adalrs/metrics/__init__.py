"""Metrics of a run: console, TensorBoard, Weights & Biases, metrics.jsonl and the decision journal.

The trainer's `RunRecorder` passes records, which are plain mappings, to `Metrics.write`; each sink writes the
fields that it shows. Only the first rank has sinks.

To add a metric, add its field to `TrainStep` in `records.py`, its value in
`RunRecorder.log_step` (`training/run_recorder.py`), and its name to `Scalars.TRAIN` in `scalars.py` if
TensorBoard and Weights & Biases should show it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_adalrs.metrics.console import ConsoleSink
from megatron_adalrs.metrics.console_text import time_stamp, wrap
from megatron_adalrs.metrics.json_lines import JsonLines
from megatron_adalrs.metrics.scalars import Scalars, Target
from megatron_adalrs.metrics.sinks import Metrics, Record, Sink
from megatron_adalrs.metrics.wandb import WandbRun

__all__ = ["ConsoleSink", "JsonLines", "Metrics", "Record", "Sink", "announce", "open_metrics"]


def open_metrics(
    run_dir: Path,
    tensorboard_dir: Path,
    train_iters: int,
    log_interval: int,
    first_step: int,
    is_first_rank: bool,
    budget: str = "kept",
    wandb: WandbRun | None = None,
) -> Metrics:
    """Open the sinks of a run that starts or resumes at `first_step`.

    Args:
        run_dir: Folder of metrics.jsonl and decisions.jsonl.
        tensorboard_dir: Folder of TensorBoard's event files.
        train_iters: Length of the run in steps.
        log_interval: Steps between console lines and points of the dashboards.
        first_step: Kept steps so far.
        is_first_rank: Whether this process has sinks at all.
        budget: Steps that `train_iters` counts, "kept" or "total".
        wandb: Run of Weights & Biases that shows the same scalars as TensorBoard.
    """
    if not is_first_rank:
        return Metrics([])
    from megatron_adalrs.metrics.tensorboard import EventFile

    targets: list[Target] = [EventFile(tensorboard_dir, first_step)]
    if wandb is not None:
        wandb.begin()
        targets.append(wandb)
    return Metrics(
        [
            JsonLines(run_dir / "metrics.jsonl", frozenset({"train", "eval", "corpora", "run"})),
            JsonLines(run_dir / "decisions.jsonl", frozenset({"decision"})),
            *(Scalars(target, log_interval, first_step) for target in targets),
            ConsoleSink(train_iters, log_interval, first_step, budget),
        ]
    )


def announce(text: str, is_first_rank: bool) -> None:
    """Print a message on the first rank, before there is a run to record."""
    if is_first_rank:
        print(wrap(text, time_stamp(sys.stdout)), flush=True)
