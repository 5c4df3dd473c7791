"""The training loop: the page that tells the story."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_adalrs.adalrs.controller import Controller, Decision, Event
from megatron_adalrs.adalrs.robust import INITIAL
from megatron_adalrs.checkpoint import Places, save_checkpoint
from megatron_adalrs.config import Config
from megatron_adalrs.data.loader import BatchLoader
from megatron_adalrs.engine import Engine, StepResult, memory_bytes
from megatron_adalrs.metrics import Metrics, perplexity, quantity
from megatron_adalrs.parallel.topology import Grid
from megatron_adalrs.rank_check import RanksDiffer, check_ranks
from megatron_adalrs.schedule import Schedule
from megatron_adalrs.snapshot import EngineSnapshot
from megatron_adalrs.stop_signal import StopSignal

INTERRUPTED = 143
"""Exit code of a run that was saved before its end, to be resumed: as a shell reports SIGTERM."""
UNSAVED = 1
"""Exit code of a run whose last checkpoint could not be written."""


@dataclass
class TrainState:
    """How far a run is. Only the trainer moves it."""

    step: int = 0
    """Kept steps completed."""
    consumed_samples: int = 0
    """Position in the data: samples that the kept steps have consumed."""
    total_steps: int = 0
    """Steps executed, discarded ones included."""
    evaluated_at: int = 0
    """Step of the last evaluation."""
    snapshot_seconds: float = 0.0
    """Time spent on capturing and restoring snapshots."""

    @property
    def discarded_steps(self) -> int:
        return self.total_steps - self.step

    def advance(self, samples: int) -> None:
        self.step += 1
        self.total_steps += 1
        self.consumed_samples += samples

    def go_to(self, past: TrainState) -> None:
        """To the step and data position of a snapshot. What was executed since stays counted."""
        self.step, self.consumed_samples = past.step, past.consumed_samples


@dataclass(frozen=True)
class Evaluation:
    """A part of the data that the loss is measured on: its first `batches` global batches."""

    split: str
    loader: BatchLoader
    batches: int

    def steps(self) -> Iterator[list[Any]]:
        return (self.loader.micro_batches(index * self.loader.global_batch_size) for index in range(self.batches))


class Trainer:
    """Runs a configured training to its end, or to an interruption that leaves a checkpoint behind."""

    def __init__(
        self,
        *,
        config: Config,
        grid: Grid,
        engine: Engine,
        batches: BatchLoader,
        evaluations: list[Evaluation],
        schedule: Schedule,
        controller: Controller,
        metrics: Metrics,
        state: TrainState,
        identity: Callable[[int], dict[str, Any]],
        flops_per_token: float,
        initial: EngineSnapshot | None = None,
    ) -> None:
        self.config, self.grid, self.engine, self.batches = config, grid, engine, batches
        self.evaluations, self.schedule, self.controller = evaluations, schedule, controller
        self.metrics, self.state, self.identity = metrics, state, identity
        self._flops_per_token = flops_per_token
        self._snapshots: dict[str, tuple[EngineSnapshot, TrainState]] = {}
        if initial is not None:
            self._snapshots[INITIAL] = initial, TrainState()
        self._saved_at = self._started_at = state.step
        self._started = time.monotonic()

    def train(self) -> int:
        """Train to the end. Returns the exit code: 0, `INTERRUPTED` or `UNSAVED`.

        Raises:
            RanksDiffer: on every rank, with --check-ranks-every.
        """
        with StopSignal() as stop:
            self.carry_out(self.controller.resume())
            self.evaluate_and_save_when_due()  # what an interruption came before
            while not self.finished:
                stop_requested = self.step(stop.received or self.is_out_of_time).stop_requested
                self.check_ranks_when_due()
                if stop_requested:
                    return self.interrupt()
                self.evaluate_and_save_when_due()
                if self.exits_here:
                    return self.interrupt()
        return self.finish()

    @property
    def is_out_of_time(self) -> bool:
        """Whether this process, as this rank sees it, has run for `exit_duration_in_mins`."""
        minutes = self.config.run.exit_duration_in_mins
        return minutes is not None and time.monotonic() - self._started > 60 * minutes

    @property
    def exits_here(self) -> bool:
        """Whether to end at this step; the same on every rank."""
        every, step = self.config.run.exit_interval, self.state.step
        return is_due(every, step, self._started_at) and not self.controller.undecided and not self.finished

    @property
    def position(self) -> int:
        """Steps that the schedule and train_iters count: the kept ones, or all (`adalrs.budget`)."""
        return self.state.step + self.controller.ahead

    @property
    def finished(self) -> bool:
        return self.position >= self.config.training.train_iters

    def step(self, stop: bool = False) -> StepResult:
        """One optimizer step: rate, batch, loss, decision. `stop`: this rank asks all ranks to stop after it."""
        started, phase = time.perf_counter(), self.controller.phase
        lr = self.schedule(self.position) * self.config.optimizer.lr * self.controller.scale
        self.engine.set_lr(lr)
        result = self.engine.train_batch(self.batches.micro_batches(self.state.consumed_samples), stop)
        self.state.advance(self.batches.global_batch_size)
        self.report_step(result, lr, phase, time.perf_counter() - started)
        self.carry_out(self.controller.observe(result.loss, result.applied))
        return result

    def carry_out(self, decision: Decision) -> None:
        """Do what the controller asks for, on every rank alike, and write it in the journal."""
        if decision.event is None:
            return
        started = time.perf_counter()
        if decision.capture is not None:
            snapshot, _ = self._snapshots.get(decision.capture, (None, None))
            snapshot = snapshot or EngineSnapshot(self.engine, self.config.adalrs.snapshot_dir)
            snapshot.capture()
            self._snapshots[decision.capture] = snapshot, replace(self.state)
        if decision.restore is not None:
            snapshot, past = self._snapshots[decision.restore]
            snapshot.restore()
            self.state.go_to(past)
        self._free_snapshots(decision)
        seconds = time.perf_counter() - started
        self.state.snapshot_seconds += seconds if decision.restore or decision.capture else 0.0
        record = asdict(decision) | {"event": decision.event.value, "total_steps": self.state.total_steps}
        self.metrics.write("decision", record | {"step": self.state.step, "snapshot_seconds": seconds})

    def _free_snapshots(self, decision: Decision) -> None:
        """Free those that no decision will ask for again. Until then buffers are reused: allocating them takes long."""
        ended = decision.event is Event.SEARCH_ENDED
        for name in [
            name for name in self._snapshots if ended or (name == INITIAL and not self.controller.needs_initial)
        ]:
            snapshot, _ = self._snapshots.pop(name)
            snapshot.free()

    def check_ranks_when_due(self) -> None:
        """Debugging: stop, on all ranks together, where they have come apart."""
        every = self.config.run.check_ranks_every
        if not every or self.state.total_steps % every:
            return
        progress = {name: value for name, value in asdict(self.state).items() if name != "snapshot_seconds"}
        search = {f"controller.{name}": value for name, value in self.controller.state_dict().items()}
        try:
            check_ranks(self.engine, self.grid, progress | {"scale": self.controller.scale} | search)
        except RanksDiffer:
            self.close("ranks_differ", f"stopped at step {self.state.step}: the ranks have come apart")
            raise

    def evaluate_and_save_when_due(self) -> None:
        """Evaluate and save at their intervals; steps that may still be undone are waited for."""
        run, step = self.config.run, self.state.step
        if self.controller.undecided or self.finished:
            return
        if is_due(run.eval_interval, step, self.state.evaluated_at):
            self.evaluate(self.evaluations[:1])
        if is_due(run.save_interval, step, self._saved_at):
            self.save()

    def evaluate(self, evaluations: list[Evaluation]) -> None:
        """Measure and record the loss on parts of the held-out data."""
        self.state.evaluated_at = self.state.step
        for evaluation in evaluations:
            loss = self.engine.evaluate(evaluation.steps())
            place = {
                "split": evaluation.split,
                "step": self.state.step,
                "total_steps": self.state.total_steps,
            }
            self.metrics.write("eval", place | {"loss": loss, "perplexity": perplexity(loss)})

    def save(self) -> bool:
        """Publish a checkpoint that resumes to the same losses, the search included. False: it could not be written.

        Training goes on without it: the previous checkpoint is untouched, and the next may succeed.
        """
        self._saved_at = self.state.step
        content = {
            "progress": asdict(self.state),
            "controller": self.controller.state_dict(),
            "identity": self.identity(self.state.consumed_samples),
            "config": self.config.to_flat(),
        }
        run = self.config.run
        try:
            places = Places(run.save, run.keep_last, run.save_retain_interval)
            save_checkpoint(self.engine, self.grid, places, self.state.step, content)
        except ValueError as error:  # raised on all ranks alike; the run itself is sound
            self.record("save_failed", f"no checkpoint at step {self.state.step}: {error}")
            return False
        return True

    def interrupt(self) -> int:
        """Undo a trial under way, save, and say how to go on."""
        self.carry_out(self.controller.interrupt())
        saved = self.save()
        how = (
            f"go on with --load {self.config.run.save}" if saved else "what was done since the last checkpoint is lost"
        )
        self.close("interrupted", f"interrupted at step {self.state.step}; {how}")
        return INTERRUPTED if saved else UNSAVED

    def finish(self) -> int:
        self.evaluate(self.evaluations)
        saved = self.save()
        self.close("end", self.summary(saved))
        return 0 if saved else UNSAVED

    def close(self, event: str, message: str) -> None:
        """Record how the run ends, and let go of files."""
        self.record(event, message)
        self.metrics.close()
        for loader in (self.batches, *(evaluation.loader for evaluation in self.evaluations)):
            loader.close()

    def record(self, event: str, message: str) -> None:
        """Record something about the run as a whole, and tell it."""
        state = self.state
        progress = {
            "step": state.step,
            "total_steps": state.total_steps,
            "snapshot_seconds": state.snapshot_seconds,
        }
        self.metrics.write("run", {"event": event, **progress, "message": message})

    def summary(self, saved: bool) -> str:
        """The last lines of a run: what the search found and what it cost."""
        state, lr = self.state, self.config.optimizer.lr
        where = f"checkpoint in {self.config.run.save}" if saved else "without a checkpoint of the end"
        lines = [f"done: {state.step} steps, {where}"]
        if self.config.adalrs.enabled:
            tokens = self.batches.global_batch_size * self.config.model.seq_length
            kept, gone = (quantity(steps * tokens, "token") for steps in (state.step, state.discarded_steps))
            scale, share = self.controller.scale, state.discarded_steps / state.total_steps
            lines += [
                f"AdaLRS took the base learning rate from {lr:g} to {lr * scale:.4g} (x {scale:.4g})",
                f"it cost {state.discarded_steps} discarded steps ({share:.1%} of all; {gone} beside {kept} kept) "
                f"and {state.snapshot_seconds:.1f} s of snapshots",
            ]
        return "\n".join(lines)

    def report_step(self, result: StepResult, lr: float, phase: str, seconds: float) -> None:
        sequence = self.config.model.seq_length
        tokens = self.batches.global_batch_size * sequence
        self.metrics.write(
            "train",
            {
                "step": self.state.step,
                "total_steps": self.state.total_steps,
                "loss": result.loss,
                "lr": lr,
                "scale": self.controller.scale,
                "phase": phase,
                "grad_norm": result.grad_norm,
                "applied": result.applied,
                "tokens_per_second": tokens / seconds,
                "flops_per_second": self._flops_per_token * tokens / seconds,
                "seconds": seconds,
                "memory_bytes": memory_bytes(),
                "consumed_tokens": self.state.consumed_samples * sequence,
                "discarded_tokens": self.state.discarded_steps * tokens,
            },
        )


def is_due(every: int | None, step: int, last: int) -> bool:
    """Whether a step that `every` divides lies after step `last`, up to and including `step`."""
    return every is not None and step // every > last // every
