"""The training loop: the page that tells the story."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import asdict

from megatron_adalrs.adalrs.controller import Controller, schedule_step
from megatron_adalrs.adalrs.decision import Decision, Event, apply_decision
from megatron_adalrs.adalrs.race_state import INITIAL
from megatron_adalrs.checkpoint.train_state import TrainState, is_due
from megatron_adalrs.checkpoint.writer import CheckpointWriteError, CheckpointWriter
from megatron_adalrs.engine import Engine, StepResult, memory_bytes
from megatron_adalrs.metrics import Metrics
from megatron_adalrs.optim.lr_schedule import Schedule
from megatron_adalrs.training.consistency_check import RanksDiffer, check_ranks
from megatron_adalrs.training.data import TrainingData
from megatron_adalrs.training.evaluation import Evaluation, evaluated
from megatron_adalrs.training.loss_guard import REWIND, GuardEvent, LossGuard
from megatron_adalrs.training.resolve import ResolvedRun
from megatron_adalrs.training.rollback import RollbackStore
from megatron_adalrs.training.run_messages import summary
from megatron_adalrs.training.stop_signal import StopSignal
from megatron_adalrs.utils.format import perplexity

INTERRUPTED = 143
"""Exit code of a run that was saved before its end, to be resumed: as a shell reports SIGTERM."""
UNSAVED = 1
"""Exit code of a run whose last checkpoint could not be written."""
STOPPED = 5
"""Exit code of a run that ended at bad numbers, with the weights from before them saved."""


class Trainer:
    """Runs a configured training to its end, or to an interruption that leaves a checkpoint behind."""

    def __init__(
        self,
        *,
        run: ResolvedRun,
        data: TrainingData,
        engine: Engine,
        schedule: Schedule,
        controller: Controller,
        loss_guard: LossGuard,
        rollback: RollbackStore,
        metrics: Metrics,
        state: TrainState,
    ) -> None:
        self.run = run
        self.config = run.config
        self.mesh = run.mesh
        self.data = data
        self.batches = data.batches
        self.engine = engine
        self.schedule = schedule
        self.controller = controller
        self.loss_guard = loss_guard
        self.rollback = rollback
        self.metrics = metrics
        self.state = state
        self._checkpoints = CheckpointWriter(engine, run.mesh, run.config.run, self.record)
        self._stopped: Decision | None = None
        self._point_due = False
        self._saved_at = state.step
        self._started_at = state.step
        self._started = time.monotonic()

    def train(self) -> int:
        """Train to the end. Returns the exit code: 0, `INTERRUPTED`, `STOPPED` or `UNSAVED`.

        Raises:
            RanksDiffer: on every rank, with --check-ranks-every.
        """
        try:
            with StopSignal() as stop:
                return self.train_until(stop)
        except CheckpointWriteError as error:
            self.close("stopped", f"stopped at step {self.state.step}: {error}")
            return UNSAVED

    def train_until(self, stop: StopSignal) -> int:
        self.apply_decision(self.controller.resume())
        self.report_corpora()
        self.evaluate_and_save_when_due()  # what an interruption came before
        while not self.finished:
            stop_requested = self.step(stop.received or self.is_out_of_time).stop_requested
            self.check_ranks_when_due()
            if self._stopped:
                return self.end_stopped(self._stopped)
            if stop_requested:
                return self.interrupt()
            self._checkpoints.publish_when_written()
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
        return (
            is_due(every, step, self._started_at)
            and not self.controller.has_pending_rollback
            and not self.finished
        )

    @property
    def position(self) -> int:
        """Steps that train_iters counts: the kept ones, or all (`adalrs.budget`)."""
        return self.state.step + self.controller.schedule_offset

    @property
    def finished(self) -> bool:
        return self.position >= self.config.training.train_iters

    @property
    def is_on_trial(self) -> bool:
        """Whether a search tests a rate and may undo these steps: then bad numbers are its own business."""
        return self.controller.has_pending_rollback and self.controller.phase in ("trial", "restart")

    def step(self, stop: bool = False) -> StepResult:
        """One optimizer step: rate, batch, loss, decision. `stop`: this rank asks all ranks to stop after
        it."""
        started, phase = time.perf_counter(), self.controller.phase
        optimizer = self.config.optimizer
        factor = self.schedule(schedule_step(self.controller, self.state.step, optimizer.lr_warmup_iters))
        lr = factor * optimizer.lr * self.controller.scale
        self.engine.set_lr(lr)
        judge = None if self.is_on_trial else self.loss_guard
        if judge:
            judge.expect(self.controller.scale)
        accept = judge.accepts if judge and judge.refuses_updates else None
        result = self.engine.train_batch(self.batches.micro_batches(self.state.next_sample), stop, accept)
        self.state.advance(self.batches.global_batch_size)
        self.report_step(result, lr, phase, time.perf_counter() - started)
        numbers, batch = (result.loss, result.grad_norm, result.applied), self.batches.global_batch_size
        bad = judge and judge.observe(
            numbers, self.state, batch, self.controller.scale, self.rollback.state_at(REWIND)
        )
        self.apply_decision(bad or self.controller.observe(result.loss, result.applied))
        return result

    def apply_decision(self, decision: Decision) -> None:
        """Apply a decision, on every rank alike, and record it in the journal."""
        if decision.event is None:
            return
        started = time.perf_counter()
        is_guards = isinstance(decision.event, GuardEvent)
        if is_guards:
            self.state.undo(
                decision.discarded_steps, self.batches.global_batch_size, decision.skipped_samples
            )
        apply_decision(decision, self)
        self.rollback.free(lambda name: name != REWIND and self._is_over(name, decision))
        self._point_due |= decision.event not in (Event.WINDOW, GuardEvent.REWOUND)
        seconds = time.perf_counter() - started
        if (decision.restore or decision.capture) and not is_guards:
            self.state.snapshot_seconds += seconds
        progress = {"step": self.state.step, "total_steps": self.state.total_steps}
        record = asdict(decision) | progress | {"event": decision.event.value, "snapshot_seconds": seconds}
        self.metrics.write("decision", record)
        if decision.event is GuardEvent.STOPPED:
            self._stopped = decision
        elif decision.event is GuardEvent.REWOUND:
            # As in a new process: the snapshots of the search are taken anew.
            self.apply_decision(self.controller.resume())

    def capture(self, name: str) -> None:
        """Take a snapshot of the engine and of the run's progress."""
        self.rollback.capture(name, self.state, self.loss_guard.memory)

    def restore(self, name: str) -> None:
        """Go back to a snapshot: the engine, the run's progress, the loss guard and, if kept, the search."""
        point = self.rollback.restore(name)
        self.state.restore_progress(point.state)
        self.loss_guard.memory = point.memory
        if point.search is not None:
            self.controller.load_state_dict(point.search)
            self.state.evaluated_at = point.state.evaluated_at

    def _is_over(self, name: str, decision: Decision) -> bool:
        """Whether no decision will ask for a snapshot again. Until then buffers are reused."""
        return decision.event is Event.SEARCH_ENDED or (name == INITIAL and not self.controller.needs_initial)

    def keep_point_when_due(self) -> None:
        """Take the snapshot to rewind to: at its interval, and wherever a rewind must not go back behind.

        That is a checkpoint, from which a resumed run could not, and what a search decided, whose snapshots
        are gone.
        """
        every, kept = self.config.loss_guard.rewind_interval, self.rollback.state_at(REWIND)
        if kept is None or self._point_due or is_due(every, self.state.step, kept.step):
            self.rollback.capture(
                REWIND, self.state, self.loss_guard.memory, deepcopy(self.controller.state_dict())
            )
            self._point_due = False

    def check_ranks_when_due(self) -> None:
        """Debugging: stop, on all ranks together, where they have come apart."""
        every = self.config.run.check_ranks_every
        if not every or self.state.total_steps % every:
            return
        progress = {name: value for name, value in asdict(self.state).items() if name != "snapshot_seconds"}
        parts = {"controller": self.controller, "loss_guard": self.loss_guard}
        states = {
            f"{part}.{name}": value for part, at in parts.items() for name, value in at.state_dict().items()
        }
        try:
            check_ranks(self.engine, self.mesh, progress | {"scale": self.controller.scale} | states)
        except RanksDiffer:
            self.close("ranks_differ", f"stopped at step {self.state.step}: the ranks have come apart")
            raise

    def evaluate_and_save_when_due(self) -> None:
        """Evaluate, save and keep a point at their intervals; steps that may still be undone are waited
        for."""
        run, step = self.config.run, self.state.step
        if self.controller.has_pending_rollback or self.finished:
            return
        if is_due(run.eval_interval, step, self.state.evaluated_at):
            self.evaluate(self.data.evaluations[:1])
        if is_due(run.save_interval, step, self._saved_at):
            self.save(beside_training=run.async_save)
        if self.loss_guard.needs_snapshots:
            self.keep_point_when_due()

    def evaluate(self, evaluations: list[list[Evaluation]]) -> None:
        """Measure and record the loss on parts of the held-out data, and what the weights have seen by
        then."""
        self.state.evaluated_at = self.state.step
        self.report_corpora()
        for corpora in evaluations:
            for split, loss in evaluated(self.engine, corpora):
                place = {"split": split, "step": self.state.step, "total_steps": self.state.total_steps}
                self.metrics.write("eval", place | {"loss": loss, "perplexity": perplexity(loss)})

    def report_corpora(self) -> None:
        """Record what the kept steps have consumed of each corpus: a function of the position in the data."""
        state = self.state
        if state.step:
            uses = self.data.blend.used(state.consumed_samples, state.skipped_samples)
            place = {"step": state.step, "total_steps": state.total_steps}
            self.metrics.write("corpora", place | {"corpora": [asdict(use) for use in uses]})

    def save(self, beside_training: bool = False) -> bool:
        """A checkpoint that resumes to the same losses, the search included. False: it could not be written.

        Training goes on without it: the previous checkpoint is untouched, and the next may succeed.

        Raises:
            CheckpointWriteError: one that was being written beside the training could not be.
        """
        self._saved_at, self._point_due = self.state.step, True
        content = {
            "progress": asdict(self.state),
            "controller": self.controller.state_dict(),
            "loss_guard": self.loss_guard.state_dict(),
            "identity": self.data.identity(self.state.consumed_samples),
            "config": self.config.to_flat(),
        }
        return (self._checkpoints.begin if beside_training else self._checkpoints.save)(
            self.state.step, content
        )

    def interrupt(self) -> int:
        """Undo a trial under way, save, and say how to go on."""
        saved, how = self.leave()
        self.close("interrupted", f"interrupted at step {self.state.step}; {how}")
        return INTERRUPTED if saved else UNSAVED

    def end_stopped(self, decision: Decision) -> int:
        """The same where bad numbers end a run."""
        _, how = self.leave()
        self.close(
            "stopped", f"stopped at step {self.state.step}: {decision.reason}; {how}, and other settings"
        )
        return STOPPED

    def leave(self) -> tuple[bool, str]:
        """Undo a trial under way and save. Returns whether it was saved, and how to go on."""
        self.apply_decision(self.controller.interrupt())
        if self.save():
            return True, f"go on with --load {self.config.run.save}"
        return False, "what was done since the last checkpoint is lost"

    def finish(self) -> int:
        self.evaluate(self.data.evaluations)
        saved = self.save()
        self.close(
            "end",
            summary(self.config, self.state, self.run.global_batch_size, self.controller.scale, saved),
        )
        return 0 if saved else UNSAVED

    def close(self, event: str, message: str) -> None:
        """Record how the run ends, and let go of files."""
        self.record(event, message)
        self.metrics.close()
        self.data.close()

    def record(self, event: str, message: str) -> None:
        """Record something about the run as a whole, and tell it."""
        state = self.state
        progress = {
            "step": state.step,
            "total_steps": state.total_steps,
            "snapshot_seconds": state.snapshot_seconds,
        }
        self.metrics.write("run", {"event": event, **progress, "message": message})

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
                "flops_per_second": self.run.flops_per_token * tokens / seconds,
                "seconds": seconds,
                "memory_bytes": memory_bytes(),
                "consumed_tokens": self.state.used_samples * sequence,
                "discarded_tokens": self.state.discarded_steps * tokens,
            },
        )
