"""The training loop."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import asdict

from megatron_adalrs.adalrs.controller import Controller, observed, schedule_step
from megatron_adalrs.adalrs.decision import Decision, Event, apply_decision
from megatron_adalrs.adalrs.robust import INITIAL
from megatron_adalrs.checkpoint.retention import CheckpointFolder
from megatron_adalrs.checkpoint.train_state import TrainState, is_due
from megatron_adalrs.checkpoint.writer import CheckpointWriteError, CheckpointWriter
from megatron_adalrs.engine import Engine, StepResult
from megatron_adalrs.metrics import Metrics
from megatron_adalrs.optim.lr_schedule import Schedule
from megatron_adalrs.training.consistency_check import RanksDiffer, check_ranks
from megatron_adalrs.training.data import TrainingData
from megatron_adalrs.training.evaluation import Evaluation, evaluated
from megatron_adalrs.training.loss_guard import REWIND, GuardEvent, NoLossGuard, StepGuard
from megatron_adalrs.training.resolve import ResolvedRun
from megatron_adalrs.training.rollback import RollbackStore
from megatron_adalrs.training.run_messages import command_to_continue, summary
from megatron_adalrs.training.run_recorder import RunRecorder
from megatron_adalrs.training.stop_signal import StopSignal

INTERRUPTED = 143
"""Exit code of a run that was saved before its end and can be resumed; the shell's code for SIGTERM."""
UNSAVED = 1
"""Exit code of a run whose last checkpoint could not be written."""
STOPPED = 5
"""Exit code of a run that the loss guard stopped, with the weights from before the faulty step saved."""


class Trainer:
    """Runs a training until it is complete, interrupted or stopped, and saves a checkpoint at the end.

    Args:
        run: Resolved configuration.
        data: Training batches and evaluations.
        engine: Model and optimizer.
        schedule: Factor on the learning rate at each step, before the scale of the search.
        controller: Learning-rate search; `FixedRate` without a search.
        loss_guard: Check of each step; `NoLossGuard` without a policy.
        rollback: Snapshots that the run can go back to.
        metrics: Sinks of the records.
        state: Progress of the run, which only the trainer updates.
    """

    def __init__(
        self,
        *,
        run: ResolvedRun,
        data: TrainingData,
        engine: Engine,
        schedule: Schedule,
        controller: Controller,
        loss_guard: StepGuard,
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
        self._recorder = RunRecorder(run, data, metrics, state)
        settings = run.config.run
        folder = CheckpointFolder(
            run.directory.folders.save, settings.keep_last, settings.save_retain_interval
        )
        self._checkpoints = CheckpointWriter(engine, run.mesh, folder, self._recorder.log_event)
        self._trial_guard = NoLossGuard()
        self._stopped: Decision | None = None
        self._rewind_point_due = False
        self._saved_at = state.step
        self._started_at = state.step
        self._started = time.monotonic()

    def train(self) -> int:
        """Train until the run is complete, interrupted or stopped.

        Returns:
            Exit code: 0, `INTERRUPTED`, `STOPPED` or `UNSAVED`.

        Raises:
            RanksDiffer: `--check-ranks-every` found a difference; raised on every rank.
        """
        try:
            with StopSignal() as stop:
                return self._train_until(stop)
        except CheckpointWriteError as error:
            self.close("stopped", f"stopped at step {self.state.step}: {error}")
            return UNSAVED

    def _train_until(self, stop: StopSignal) -> int:
        self.apply_decision(self.controller.resume())
        self._recorder.log_corpora()
        self.evaluate_and_save_if_due()  # an interruption may have come before these
        while not self.finished:
            result = self.step(stop.received or self.is_out_of_time)
            self.check_ranks_if_due()
            if self._stopped:
                return self._end_stopped(self._stopped)
            if result.stop_requested:
                return self._interrupt()
            self._checkpoints.publish_when_written()
            self.evaluate_and_save_if_due()
            if self.exits_here:
                return self._interrupt()
        return self._finish()

    def step(self, stop: bool = False) -> StepResult:
        """Take one optimizer step and apply the decision that follows from its loss.

        Args:
            stop: Whether this rank asks all ranks to stop after the step.
        """
        started = time.perf_counter()
        scale = self.controller.scale
        phase = self.controller.phase
        guard = self.active_guard
        lr = self.learning_rate
        self.engine.set_lr(lr)
        accept = guard.before_step(scale)
        result = self.engine.train_batch(self.batches.micro_batches(self.state.next_sample), stop, accept)
        self.state.advance(self.run.global_batch_size)
        self._recorder.log_step(result, lr, scale, phase, time.perf_counter() - started)
        rewind_to = self.rollback.state_at(REWIND)
        fault = guard.observe(result, self.state, self.run.global_batch_size, scale, rewind_to)
        self.apply_decision(fault or self.controller.observe(*observed(result.loss, result.applied)))
        return result

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        optimizer = self.config.optimizer
        factor = self.schedule(schedule_step(self.controller, self.state.step, optimizer.lr_warmup_iters))
        return factor * optimizer.lr * self.controller.scale

    @property
    def active_guard(self) -> StepGuard:
        """Loss guard of the next step.

        The search itself undoes a trial whose loss is not finite or rises, so steps of a trial have none.
        """
        is_trial = self.controller.has_pending_rollback and self.controller.phase in ("trial", "restart")
        return self._trial_guard if is_trial else self.loss_guard

    @property
    def finished(self) -> bool:
        """Whether `train_iters` steps are complete: kept ones, or all (`adalrs.budget`)."""
        return self.state.step + self.controller.schedule_offset >= self.config.training.train_iters

    @property
    def is_out_of_time(self) -> bool:
        """Whether this process has run for `exit_duration_in_mins`; ranks may differ."""
        minutes = self.config.run.exit_duration_in_mins
        return minutes is not None and time.monotonic() - self._started > 60 * minutes

    @property
    def exits_here(self) -> bool:
        """Whether `exit_interval` ends the run at this step; the same on every rank."""
        return (
            is_due(self.config.run.exit_interval, self.state.step, self._started_at)
            and not self.controller.has_pending_rollback
            and not self.finished
        )

    def apply_decision(self, decision: Decision) -> None:
        """Apply a decision, on every rank alike, and record it in the journal."""
        if decision.event is None:
            return
        started = time.perf_counter()
        is_guards = isinstance(decision.event, GuardEvent)
        if is_guards:
            self.state.undo(decision.discarded_steps, self.run.global_batch_size, decision.skipped_samples)
        apply_decision(decision, self)
        self.rollback.free(lambda name: name != REWIND and self._is_over(name, decision))
        self._rewind_point_due |= decision.event not in (Event.WINDOW, GuardEvent.REWOUND)
        seconds = time.perf_counter() - started
        if (decision.restore or decision.capture) and not is_guards:
            self.state.snapshot_seconds += seconds
        self._recorder.log_decision(decision, decision.event.value, seconds)
        if decision.event is GuardEvent.STOPPED:
            self._stopped = decision
        elif decision.event is GuardEvent.REWOUND:
            # As in a new process: the snapshots of the search are taken anew.
            self.apply_decision(self.controller.resume())

    def capture(self, name: str) -> None:
        """Take a snapshot of the engine and of the run's progress."""
        self.rollback.capture(name, self.state, self.loss_guard.statistics)

    def restore(self, name: str) -> None:
        """Go back to a snapshot: the engine, the run's progress, the loss guard and, if kept, the search."""
        point = self.rollback.restore(name)
        self.state.restore_progress(point.state)
        self.loss_guard.statistics = point.statistics
        if point.search is not None:
            self.controller.load_state_dict(point.search)
            self.state.evaluated_at = point.state.evaluated_at

    def _is_over(self, name: str, decision: Decision) -> bool:
        """Return whether no decision will restore a snapshot again, so that its memory can be freed."""
        return decision.event is Event.SEARCH_ENDED or (name == INITIAL and not self.controller.needs_initial)

    def evaluate_and_save_if_due(self) -> None:
        """Evaluate, save and take the rewind snapshot at their intervals; not during a trial."""
        run = self.config.run
        if self.controller.has_pending_rollback or self.finished:
            return
        if is_due(run.eval_interval, self.state.step, self.state.evaluated_at):
            self.evaluate(self.data.evaluations[:1])
        if is_due(run.save_interval, self.state.step, self._saved_at):
            self.save(in_background=run.async_save)
        if self.loss_guard.needs_snapshots:
            self._capture_rewind_point_if_due()

    def _capture_rewind_point_if_due(self) -> None:
        """Take the rewind snapshot at its interval, after a checkpoint and after a decision of the search.

        A rewind must not go back behind a checkpoint, since a resumed run could not, nor behind a decision,
        since the snapshots of the search from before it are freed.
        """
        every = self.config.loss_guard.rewind_interval
        last = self.rollback.state_at(REWIND)
        if last is None or self._rewind_point_due or is_due(every, self.state.step, last.step):
            search = deepcopy(self.controller.state_dict())
            self.rollback.capture(REWIND, self.state, self.loss_guard.statistics, search)
            self._rewind_point_due = False

    def check_ranks_if_due(self) -> None:
        """Compare the state of all ranks every `check_ranks_every` steps, for debugging.

        Raises:
            RanksDiffer: The ranks differ; raised on every rank, after the run has been closed.
        """
        every = self.config.run.check_ranks_every
        if not every or self.state.total_steps % every:
            return
        agreed = asdict(self.state) | {"scale": self.controller.scale}
        del agreed["snapshot_seconds"]
        agreed |= {f"controller.{name}": value for name, value in self.controller.state_dict().items()}
        agreed |= {f"loss_guard.{name}": value for name, value in self.loss_guard.state_dict().items()}
        try:
            check_ranks(self.engine, self.mesh, agreed)
        except RanksDiffer:
            self.close("ranks_differ", f"stopped at step {self.state.step}: the ranks differ")
            raise

    def evaluate(self, evaluations: list[list[Evaluation]]) -> None:
        """Evaluate splits of the held-out data, and record the losses and the data consumed so far."""
        self.state.evaluated_at = self.state.step
        self._recorder.log_corpora()
        for corpora in evaluations:
            for split, loss in evaluated(self.engine, corpora):
                self._recorder.log_evaluation(split, loss)

    def save(self, in_background: bool = False) -> bool:
        """Save a checkpoint from which a resumed run has the same losses and the same search.

        Returns:
            Whether the checkpoint could be written. If not, training continues: the previous checkpoint is
            complete, and the next one may succeed.

        Raises:
            CheckpointWriteError: The last checkpoint written in the background has failed.
        """
        self._saved_at = self.state.step
        self._rewind_point_due = True
        content = {
            "progress": asdict(self.state),
            "controller": self.controller.state_dict(),
            "loss_guard": self.loss_guard.state_dict(),
            "run": self.run.directory.start.identity.to_json(),
            "identity": self.data.identity(self.state.consumed_samples),
            "config": self.config.to_flat(),
            "deepspeed": self.engine.settings_beside_flags,
        }
        write = self._checkpoints.begin if in_background else self._checkpoints.save
        return write(self.state.step, content)

    def close(self, event: str, message: str) -> None:
        """Record how the run ends, and close its files and threads."""
        self._recorder.log_event(event, message)
        self.metrics.close()
        self.data.close()
        self.run.directory.close()

    def _finish(self) -> int:
        """Evaluate all splits, save the final checkpoint and return the exit code."""
        self.evaluate(self.data.evaluations)
        saved = self.save()
        scale = self.controller.scale
        self.close("end", summary(self.run, self.state, scale, saved))
        return 0 if saved else UNSAVED

    def _interrupt(self) -> int:
        """Save the run so that it can be resumed, and return the exit code."""
        saved, how = self._save_before_end()
        self.close("interrupted", f"interrupted at step {self.state.step}; {how}")
        return INTERRUPTED if saved else UNSAVED

    def _end_stopped(self, decision: Decision) -> int:
        """Save a run that the loss guard stopped, and return the exit code."""
        _, how = self._save_before_end()
        message = f"stopped at step {self.state.step}: {decision.reason}; {how} and other settings"
        self.close("stopped", message)
        return STOPPED

    def _save_before_end(self) -> tuple[bool, str]:
        """Undo the trial in progress, if any, and save.

        Returns:
            Whether the checkpoint could be written, and how the run can be continued.
        """
        self.apply_decision(self.controller.interrupt())
        if self.save():
            return True, f"continue with\n  {command_to_continue(self.run)}"
        return False, "all steps since the last checkpoint are lost"
