"""What a run tells: console, TensorBoard, metrics.jsonl and the decision journal. Nobody else writes any of them.

Records are plain mappings; each sink takes what it shows. Only the first rank has sinks: on the others every call is
a loop over nothing.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

Record = Mapping[str, Any]


class Sink(Protocol):
    """Somewhere that records go. `kind` is train, eval, decision or run."""

    def write(self, kind: str, record: Record) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Hands every record, stamped with the time, to every sink."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def write(self, kind: str, record: Record) -> None:
        stamped = {"kind": kind, **record, "time": time.time()}
        for sink in self._sinks:
            sink.write(kind, stamped)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """One file, one JSON object a line, flushed at once: what was written survives a kill."""

    def __init__(self, path: Path, kinds: frozenset[str]) -> None:
        self._kinds = kinds
        _cut_torn_line(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, record: Record) -> None:
        if kind in self._kinds:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Scalars over kept steps. Points that may be undone wait for the verdict; a trial's are under `trial/` at once."""

    TRAIN = (
        "loss",
        "lr",
        "scale",
        "grad_norm",
        "tokens_per_second",
        "flops_per_second",
        "memory_bytes",
        "discarded_tokens",
    )

    def __init__(self, folder: Path, log_interval: int, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._interval = log_interval
        self._writer = SummaryWriter(str(folder), purge_step=first_step or None)
        self._pending: dict[str, list[Record]] = {"control": [], "trial": []}

    def write(self, kind: str, record: Record) -> None:
        if kind == "train" and record["step"] % self._interval == 0:
            phase = record["phase"]
            if phase not in ("control", "trial", "restart-control", "restart"):
                self._add_train(record)
            elif phase in self._pending:
                self._pending[phase].append(record)
            if phase in ("trial", "restart"):
                self._writer.add_scalar(f"{phase}/loss", record["loss"], record["step"])
        elif kind == "eval":
            for name in ("loss", "perplexity"):
                self._writer.add_scalar(f"{record['split']}/{name}", record[name], record["step"])
        elif kind == "decision":
            self._add_decision(record)

    def close(self) -> None:
        self._writer.close()

    def _add_train(self, record: Record) -> None:
        for name in self.TRAIN:
            self._writer.add_scalar(f"train/{name}", record[name], record["step"])

    def _add_decision(self, record: Record) -> None:
        if record["velocity"] is not None:
            self._writer.add_scalar("adalrs/velocity", record["velocity"], record["total_steps"])
        self._writer.add_scalar("adalrs/scale", record["scale_after"], record["total_steps"])
        event = record["event"]
        if event in ("accepted", "failed", "aborted", "neutral"):
            # Without backtracking a failed trial's steps stay too.
            trial_stays = event == "accepted" or not record["restore"]
            for kept in self._pending["trial" if trial_stays else "control"]:
                self._add_train(kept)
        if event != "trial_started":
            for pending in self._pending.values():
                pending.clear()


class Terminal:
    """A line every `log_interval` steps and for each decision; a progress bar below them where a person looks on."""

    def __init__(self, train_iters: int, log_interval: int, first_step: int, budget: str = "kept") -> None:
        self._train_iters, self._interval = train_iters, log_interval
        self._counted = "total_steps" if budget == "total" else "step"
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._seconds_per_step: float | None = None
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(None),
                TaskProgressColumn(),
                TimeElapsedColumn(),
            )
            self._progress = Progress(*columns, console=self._console, refresh_per_second=4)
            self._task = self._progress.add_task("training", total=train_iters, completed=first_step)
            self._progress.start()

    def write(self, kind: str, record: Record) -> None:
        if kind == "train":
            self._train(record)
        elif kind == "eval":
            self._print(
                f"[bold]{record['split']:>5} at step {record['step']}[/] | loss {record['loss']:.4f} | "
                f"perplexity {record['perplexity']:.2f}"
            )
        elif kind == "decision" and record["event"] != "window":
            colour = {"accepted": "green", "failed": "red", "aborted": "red", "scaled_down": "red"}.get(
                record["event"], "cyan"
            )
            self._print(f"[{colour}]AdaLRS {record['event'].replace('_', ' ')}[/] | {record['reason']}")
        elif kind == "run" and record.get("message"):
            self._print(record["message"])

    def close(self) -> None:
        if self._progress:
            self._progress.stop()

    def _train(self, record: Record) -> None:
        past = self._seconds_per_step or record["seconds"]
        self._seconds_per_step = 0.98 * past + 0.02 * record["seconds"]
        if self._progress:
            self._progress.update(self._task, completed=record[self._counted])
        if record[self._counted] % self._interval == 0:
            left = max(0, self._train_iters - record[self._counted]) * self._seconds_per_step
            width = len(str(self._train_iters))
            self._print(
                f"step {record[self._counted]:>{width}}/{self._train_iters} | loss {record['loss']:.4f} | "
                f"lr {record['lr']:.2e} | scale {record['scale']:.3g} | {record['phase']:<6} | "
                f"grad norm {record['grad_norm']:.2f} | {quantity(record['tokens_per_second'], 'token/s')} | "
                f"{quantity(record['flops_per_second'], 'FLOP/s')} | {quantity(record['memory_bytes'], 'B')} | "
                f"{duration(left)} left"
            )

    def _print(self, text: str) -> None:
        self._console.print(text)


def open_metrics(
    run_dir: Path,
    tensorboard_dir: Path,
    train_iters: int,
    log_interval: int,
    first_step: int,
    is_first_rank: bool,
    budget: str = "kept",
) -> Metrics:
    """The sinks of a run that begins, or goes on, at `first_step`; `budget` is what `train_iters` counts."""
    if not is_first_rank:
        return Metrics([])
    return Metrics(
        [
            JsonLines(run_dir / "metrics.jsonl", frozenset({"train", "eval", "run"})),
            JsonLines(run_dir / "decisions.jsonl", frozenset({"decision"})),
            TensorBoard(tensorboard_dir, log_interval, first_step),
            Terminal(train_iters, log_interval, first_step, budget),
        ]
    )


def announce(text: str, is_first_rank: bool) -> None:
    """Tell the console something before there is a run to record."""
    if is_first_rank:
        print(text, flush=True)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def quantity(value: float, unit: str) -> str:
    """Three significant digits, a decimal prefix and the unit: (12345, 'B') -> '12.3 kB'."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """'1d 02h', '3h 05m', '4m 09s' or '12s'."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02d}h"
    if hours:
        return f"{h}h {m:02d}m"
    return f"{m}m {s:02d}s" if minutes else f"{s}s"


def _cut_torn_line(path: Path) -> None:
    """Drop an unfinished last line that a kill left behind, so that what follows begins on a line of its own."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
