"""Resolve a configuration into everything that is known about a run before its model is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from megatron_adalrs import checkpoint
from megatron_adalrs.checkpoint.train_state import TrainState
from megatron_adalrs.config import Config
from megatron_adalrs.data.tokenizer import DataTokenizer
from megatron_adalrs.data.vocabulary import resolve_vocabulary, with_end_of_document
from megatron_adalrs.distributed.collectives import on_first_rank
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine import init_distributed, require_supported
from megatron_adalrs.engine.deepspeed_config import deepspeed_settings
from megatron_adalrs.metrics.wandb import require_wandb
from megatron_adalrs.model.flops import flops_per_token
from megatron_adalrs.model.gpt import count_parameters
from megatron_adalrs.training.run_directory import SharedRunDirectory

T = TypeVar("T")


class ResumedCheckpoint(NamedTuple):
    """Checkpoint that a run resumes from."""

    path: Path
    state: dict[str, Any]
    """Contents of its `state.json`."""

    def restore(self, entry: str, load: Callable[[Any], T]) -> T:
        """Return the result of `load` for an entry of the saved state.

        Raises:
            ValueError: The entry is missing, or `load` does not accept it.
        """
        return checkpoint.restore_entry(self.path, self.state, entry, load)


@dataclass(frozen=True)
class ResolvedRun:
    """A run's configuration and everything that was derived from it before the model is built."""

    config: Config
    """Configuration with the source of the weights and the end-of-document token filled in."""
    directory: SharedRunDirectory
    """Folders of the run, which are locked by the first rank, and how the run starts."""
    mesh: ProcessMesh
    vocab_size: int
    """Number of tokens before padding."""
    tokenizer: DataTokenizer | None
    """Tokenizer of the training data, if it is known."""
    global_batch_size: int
    """Samples in one optimizer step."""
    micro_batches: int
    """Forward and backward passes of one rank in one optimizer step."""
    resumed: ResumedCheckpoint | None
    """Checkpoint to resume from; None for a new run."""
    weights_from: Path | None
    """Checkpoint or Hugging Face folder of the initial weights; None if they are drawn at random."""

    @property
    def train_samples(self) -> int:
        """Samples that `train_iters` steps consume."""
        return self.config.training.train_iters * self.global_batch_size

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return count_parameters(self.config.model, self.vocab_size)

    @cached_property
    def flops_per_token(self) -> float:
        """Floating-point operations of a training step per token."""
        model = self.config.model
        return flops_per_token(model, self.parameters, model.padded_vocab_size(self.vocab_size))


def join_ranks(config: Config) -> tuple[ProcessMesh, str]:
    """Join the process group unless this process has joined it already. Collective.

    Returns:
        The place of this process in the mesh, without process groups, and the name of this attempt to run
        the job.

    Raises:
        ValueError: The configuration does not fit the mesh; raised on every rank before the rendezvous.
        RuntimeError: The ranks did not find each other.
    """
    mesh = ProcessMesh.from_environment(**config.parallel.sizes)
    config.micro_batches_per_step(mesh.data.size)
    deepspeed_settings(config, mesh.data.size)
    require_supported(config.training.precision)
    return mesh, init_distributed(mesh, config.run.distributed_timeout_minutes)


def resolve_config(config: Config, mesh: ProcessMesh, directory: SharedRunDirectory) -> ResolvedRun:
    """Resolve the configuration on all ranks alike. Collective.

    Args:
        mesh: Mesh with process groups.
        directory: Open run directory.

    Raises:
        ValueError, OSError: The run cannot begin; raised on every rank, naming the field or file.
    """
    on_first_rank(lambda: require_wandb(config.run.wandb_project))
    start = directory.start
    resumed = ResumedCheckpoint(start.checkpoint, start.state) if start.checkpoint and start.state else None
    source = on_first_rank(lambda: checkpoint.find_initial_weights(config.run, start.state))
    with_weights = _with_weights_from(config, source)
    vocabulary = on_first_rank(lambda: resolve_vocabulary(with_weights))
    resolved = on_first_rank(lambda: with_end_of_document(with_weights, vocabulary))
    if resumed:
        checkpoint.require_compatible(resumed.path, resumed.state, resolved, mesh)
    return ResolvedRun(
        config=resolved,
        directory=directory,
        mesh=mesh,
        vocab_size=vocabulary.size,
        tokenizer=vocabulary.tokenizer,
        global_batch_size=config.global_batch_size(mesh.data.size),
        micro_batches=config.micro_batches_per_step(mesh.data.size),
        resumed=resumed,
        weights_from=source,
    )


def restore_progress(run: ResolvedRun) -> TrainState:
    """Return the progress at the resumed checkpoint, or that of a new run."""
    return TrainState(**run.resumed.restore("progress", dict)) if run.resumed else TrainState()


def _with_weights_from(config: Config, source: Path | None) -> Config:
    """Return the configuration with the exact checkpoint of the initial weights.

    A folder may contain newer checkpoints by the time the run is resumed.
    """
    return config.model_copy(update={"run": config.run.model_copy(update={"finetune_from": source})})
