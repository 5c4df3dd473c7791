"""Records of a run: its steps, evaluations, decisions, use of the data, and events."""

from __future__ import annotations

from dataclasses import asdict

from megatron_adalrs.adalrs.decision import Decision
from megatron_adalrs.checkpoint.train_state import TrainState
from megatron_adalrs.engine import StepResult, memory_bytes
from megatron_adalrs.metrics import Metrics
from megatron_adalrs.training.data import TrainingData
from megatron_adalrs.training.resolve import ResolvedRun
from megatron_adalrs.utils.format import perplexity


class RunRecorder:
    """Writes the records of a run to its metrics, each with the progress of the run.

    Args:
        state: Progress of the run, which the trainer updates.
    """

    def __init__(self, run: ResolvedRun, data: TrainingData, metrics: Metrics, state: TrainState) -> None:
        self._run = run
        self._data = data
        self._metrics = metrics
        self._state = state

    def log_step(self, result: StepResult, lr: float, scale: float, phase: str, seconds: float) -> None:
        """Record an optimizer step.

        Args:
            lr: Learning rate of the step.
            scale: Factor on the learning rate of the schedule, which `lr` contains.
            phase: Phase of the search.
            seconds: Duration of the step.
        """
        state = self._state
        sequence = self._run.config.model.seq_length
        tokens = self._run.global_batch_size * sequence
        record = {
            "loss": result.loss,
            "lr": lr,
            "scale": scale,
            "phase": phase,
            "grad_norm": result.grad_norm,
            "applied": result.applied,
            "tokens_per_second": tokens / seconds,
            "flops_per_second": self._run.flops_per_token * tokens / seconds,
            "seconds": seconds,
            "memory_bytes": memory_bytes(),
            "consumed_tokens": state.used_samples * sequence,
            "discarded_tokens": state.discarded_steps * tokens,
        }
        self._metrics.write("train", self._progress | record)

    def log_decision(self, decision: Decision, event: str, snapshot_seconds: float) -> None:
        """Record a decision in the journal.

        Args:
            snapshot_seconds: Time that it took to apply the decision.
        """
        record = asdict(decision) | self._progress
        self._metrics.write("decision", record | {"event": event, "snapshot_seconds": snapshot_seconds})

    def log_evaluation(self, split: str, loss: float) -> None:
        """Record the loss on held-out data, in nats per token."""
        record = {"split": split, "loss": loss, "perplexity": perplexity(loss)}
        self._metrics.write("eval", self._progress | record)

    def log_corpora(self) -> None:
        """Record what the kept steps have consumed of each corpus; before the first step there is nothing."""
        state = self._state
        if state.step:
            uses = self._data.blend.used(state.consumed_samples, state.skipped_samples)
            self._metrics.write("corpora", self._progress | {"corpora": [asdict(use) for use in uses]})

    def log_event(self, event: str, message: str) -> None:
        """Record an event of the run as a whole, with a message for the console."""
        record = {"snapshot_seconds": self._state.snapshot_seconds, "message": message}
        self._metrics.write("run", {"event": event} | self._progress | record)

    @property
    def _progress(self) -> dict[str, int]:
        return {"step": self._state.step, "total_steps": self._state.total_steps}
