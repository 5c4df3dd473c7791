"""Sink that prints records to the console."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from megatron_adalrs.metrics.sinks import Record
from megatron_adalrs.utils.format import duration, quantity

_CLOSED = "the reader closed the pipe"


class _Console(Console):
    is_gone = False

    def on_broken_pipe(self) -> None:
        """Raise an error as for any other failed write, where rich would end the process.

        Standard output is redirected to the null device, so that Python can flush it when it exits.
        """
        self.is_gone = True
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.file.fileno())
        os.close(null)
        raise BrokenPipeError(_CLOSED)


class ConsoleSink:
    """Sink that prints a line every `log_interval` steps and for each decision.

    On a terminal a progress bar is shown below the lines.
    """

    name = "the console"

    def __init__(self, train_iters: int, log_interval: int, first_step: int, budget: str = "kept") -> None:
        self._train_iters, self._interval = train_iters, log_interval
        self._counted = "total_steps" if budget == "total" else "step"
        self._console = _Console(file=sys.stdout, highlight=False, soft_wrap=True)
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
        elif kind == "corpora" and len(record["corpora"]) > 1:
            uses = (
                f"{use['name']} {quantity(use['tokens'], 'token')}, {use['epochs']:.3g} epochs"
                for use in record["corpora"]
            )
            self._print(f"data at step {record['step']} | {' | '.join(uses)}")
        elif kind == "decision" and record["event"] != "window":
            event, is_bad = record["event"], record["event"].startswith("loss_guard")
            is_red = is_bad or event in ("failed", "aborted", "scaled_down")
            colour = "green" if event == "accepted" else "red" if is_red else "cyan"
            name = ("" if is_bad else "AdaLRS ") + event.replace("_", " ")
            self._print(f"[{colour}]{name}[/] | {record['reason']}")
        elif kind == "run" and record.get("message"):
            self._print(record["message"])

    def close(self) -> None:
        if self._progress:
            self._progress.stop()

    def _train(self, record: Record) -> None:
        average = self._seconds_per_step or record["seconds"]
        self._seconds_per_step = 0.98 * average + 0.02 * record["seconds"]
        if self._progress:
            self._progress.update(self._task, completed=record[self._counted])
        if record[self._counted] % self._interval == 0:
            left = max(0, self._train_iters - record[self._counted]) * self._seconds_per_step
            width = len(str(self._train_iters))
            self._print(
                f"step {record[self._counted]:>{width}}/{self._train_iters} | loss {record['loss']:.4f} | "
                f"lr {record['lr']:.2e} | scale {record['scale']:.3g} | {record['phase']:<6} | "
                f"grad norm {record['grad_norm']:.2f} | {quantity(record['tokens_per_second'], 'token/s')} | "
                f"{quantity(record['flops_per_second'], 'FLOP/s')} | "
                f"{quantity(record['memory_bytes'], 'B')} | {duration(left)} left"
            )

    def _print(self, text: str) -> None:
        if self._console.is_gone:
            raise BrokenPipeError(_CLOSED)
        self._console.print(text)
