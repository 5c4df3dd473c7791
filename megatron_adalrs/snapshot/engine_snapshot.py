"""In-memory checkpoint of the engine, restored in place."""

from __future__ import annotations

import math
from typing import Any

from megatron_adalrs.config import TrainingConfig
from megatron_adalrs.engine import Engine
from megatron_adalrs.snapshot.rng_state import RngState
from megatron_adalrs.snapshot.tensor_snapshot import TensorSnapshot


class EngineSnapshot:
    """Copy of the training state to which the engine can return, bit for bit.

    The first capture allocates the buffers and later captures reuse them. Each rank keeps its own shard, so
    all ranks must capture and restore together, between two steps.

    Args:
        engine: Engine whose state is captured.
        directory: Directory on a local disk for the tensors; they are kept in host memory by default.
    """

    def __init__(self, engine: Engine, directory: str | None = None) -> None:
        self._engine = engine
        self._tensors = TensorSnapshot(directory)
        self._counters: dict[str, Any] = {}
        self._rng: RngState | None = None
        self._end_waiting = engine.before_update(self._tensors.finish)

    def capture(self) -> None:
        """Copy the trained tensors, the optimizer state, DeepSpeed's counters and the random-number states.

        Copies from an accelerator overlap with the next step, which waits for them before its update.
        """
        self._tensors.capture(self._engine.training_state_tensors())
        self._counters = self._engine.counters()
        self._rng = RngState.capture()

    def restore(self) -> None:
        """Return to the last captured state.

        Optimizer state that was created since the capture is set to zero, its value before the first step.

        Raises:
            RuntimeError: If a captured tensor is missing or has another shape or dtype.
        """
        self._tensors.restore(self._engine.training_state_tensors())
        self._engine.sync_weights_from_masters()
        self._engine.set_counters(self._counters)
        assert self._rng is not None  # otherwise restoring the tensors has raised an error
        self._rng.restore()

    def free(self) -> None:
        """Free the memory; the snapshot cannot be used afterwards."""
        self._end_waiting()
        self._tensors.clear()

    @property
    def nbytes(self) -> int:
        """Size of the copies on this rank in bytes."""
        return self._tensors.nbytes


def estimate_snapshot_bytes(training: TrainingConfig, parameters: int, replicas: int) -> int:
    """Return the estimated size of one snapshot on each rank in bytes.

    The estimate counts 12 bytes per parameter: an fp32 value (master or weight) and AdamW's two fp32 moments.

    Args:
        training: Settings of the run; its ZeRO stage decides whether the state is sharded.
        parameters: Number of parameters in this rank's part of the model (`Engine.parameters_held`).
        replicas: Number of ranks with the same parameters; ZeRO shards masters and moments over them.
    """
    return math.ceil(12 * parameters / (replicas if training.zero_stage else 1))
