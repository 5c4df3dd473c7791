"""What a run tells: console, TensorBoard, Weights & Biases, metrics.jsonl and the decision journal.

Nobody else writes any of them. Records are plain mappings; each sink takes what it shows. Only the first rank
has sinks: on the others every call is a loop over nothing.
"""

from __future__ import annotations

from pathlib import Path

from megatron_adalrs.metrics.console import ConsoleSink
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
    """The sinks of a run that begins, or goes on, at `first_step`.

    Args:
        budget: what `train_iters` counts.
        wandb: where scalars go beside TensorBoard.
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
            *(Scalars(target, log_interval) for target in targets),
            ConsoleSink(train_iters, log_interval, first_step, budget),
        ]
    )


def announce(text: str, is_first_rank: bool) -> None:
    """Tell the console something before there is a run to record."""
    if is_first_rank:
        print(text, flush=True)
