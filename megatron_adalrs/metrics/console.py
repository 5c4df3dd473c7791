"""Sink that prints records to the console."""

from __future__ import annotations

import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from megatron_adalrs.metrics.console_text import INDENT, fill, time_stamp, wrap
from megatron_adalrs.metrics.sinks import Record
from megatron_adalrs.utils.format import NOTHING, clock, quantity

_CLOSED = "the reader closed the pipe"
PHASES = {
    "before": "search to come",
    "watch": "watching",
    "trial": "trial",
    "control": "control",
    "restart-control": "restart control",
    "restart": "restart",
    "ending": "search ending",
    "done": "search over",
}
"""Phases of the search in words. A run without a search has none."""


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
    """Sink that prints every `log_interval` steps and for each decision.

    The loss is the mean of all steps since the loss or a decision was last printed. On a terminal a progress
    bar is shown below the lines; elsewhere each line begins with the time of day.
    """

    name = "the console"

    def __init__(self, train_iters: int, log_interval: int, first_step: int, budget: str = "kept") -> None:
        self._train_iters, self._interval = train_iters, log_interval
        self._counted = "total_steps" if budget == "total" else "step"
        self._console = _Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._seconds_per_step: float | None = None
        self._started = time.monotonic()
        self._losses: list[float] = []
        self._has_reported_no_loss = False
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
            where = f"{record['split']:>5} at step {record['step']}"
            self._fields(
                [where, f"loss {record['loss']:.4f}", f"perplexity {record['perplexity']:.2f}"], where, "bold"
            )
        elif kind == "corpora" and len(record["corpora"]) > 1:
            uses = (
                f"{use['name']} {quantity(use['tokens'], 'token')}, {use['epochs']:.3g} epochs"
                for use in record["corpora"]
            )
            self._fields([f"data at step {record['step']}", *uses])
        elif kind == "decision" and record["event"] != "window":
            self._decision(record)
        elif kind == "run" and record.get("message"):
            self._print(wrap(record["message"], self._stamp))

    def close(self) -> None:
        if self._progress:
            self._progress.stop()

    def _train(self, record: Record) -> None:
        average = self._seconds_per_step or record["seconds"]
        self._seconds_per_step = 0.98 * average + 0.02 * record["seconds"]
        if self._progress:
            self._progress.update(self._task, completed=record[self._counted])
        if record["loss"] is None:
            self._report_step_without_loss(record["step"])
        else:
            self._losses.append(record["loss"])
        if record[self._counted] % self._interval == 0:
            progress, speed = self._describe(record)
            margin = " " * len(self._stamp) + INDENT
            self._print(f"{fill(progress, self._stamp)}\n{fill(speed, margin)}")
            self._losses.clear()

    def _report_step_without_loss(self, step: int) -> None:
        """Report the first such step; metrics.jsonl has null as the loss of each."""
        if not self._has_reported_no_loss:
            self._has_reported_no_loss = True
            text = f"step {step} has no loss and no update: eod_mask_loss excludes all of its targets"
            self._print(wrap(f"{text} (reported once)", self._stamp))

    def _describe(self, record: Record) -> tuple[list[str], list[str]]:
        """Return the fields of the two lines on a step."""
        assert self._seconds_per_step is not None
        counted = record[self._counted]
        left = max(0, self._train_iters - counted) * self._seconds_per_step
        elapsed = time.monotonic() - self._started
        search = []
        if phase := PHASES.get(record["phase"]):
            search = [f"scale {record['scale']:.3g}", phase]
        progress = [
            f"step {counted:>{len(str(self._train_iters))}}/{self._train_iters}",
            f"loss {sum(self._losses) / len(self._losses):.4f}" if self._losses else f"loss {NOTHING}",
            f"lr {record['lr']:.2e}",
            *search,
        ]
        speed = [
            f"grad norm {record['grad_norm']:.2f}",
            quantity(record["tokens_per_second"], "token/s"),
            quantity(record["memory_bytes"], "B"),
            f"elapsed {clock(elapsed)}, left {clock(left)}",
        ]
        return progress, speed

    def _decision(self, record: Record) -> None:
        event, is_guards = record["event"], record["event"].startswith("loss_guard")
        is_red = is_guards or event in ("failed", "aborted", "scaled_down")
        colour = "green" if event == "accepted" else "red" if is_red else "cyan"
        name = ("" if is_guards else "AdaLRS ") + event.replace("_", " ")
        self._print(_styled(wrap(f"{name} | {record['reason']}", self._stamp), name, colour))
        self._losses.clear()

    def _fields(self, fields: list[str], name: str = "", style: str = "") -> None:
        self._print(_styled(fill(fields, self._stamp), name, style))

    @property
    def _stamp(self) -> str:
        return time_stamp(self._console.file)

    def _print(self, text: str | Text) -> None:
        if self._console.is_gone:
            raise BrokenPipeError(_CLOSED)
        self._console.print(text, markup=False)


def _styled(text: str, name: str, style: str) -> Text:
    """Return the text with the first occurrence of a name in a style."""
    styled = Text(text)
    start = text.find(name)
    if name and start >= 0:
        styled.stylize(style, start, start + len(name))
    return styled
