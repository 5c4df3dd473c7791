"""The engine's in-memory checkpoint: everything that decides the following steps, captured and put back in
place."""

from __future__ import annotations

import math
from typing import Any

from megatron_adalrs.config import TrainingConfig
from megatron_adalrs.engine import Engine
from megatron_adalrs.snapshot.rng_state import RngState
from megatron_adalrs.snapshot.tensor_snapshot import TensorSnapshot


class EngineSnapshot:
    """One point of a run to which the engine can go back, bit for bit.

    The buffers are allocated by the first capture and reused by later ones. Capture and restore only between
    steps, on all ranks together: each one keeps its own shard.

    Args:
        directory: of a local disk to keep it on, instead of in host memory.
    """

    def __init__(self, engine: Engine, directory: str | None = None) -> None:
        self._engine = engine
        self._tensors = TensorSnapshot(directory)
        self._counters: dict[str, Any] = {}
        self._rng: RngState | None = None
        self._end_waiting = engine.before_update(self._tensors.finish)

    def capture(self) -> None:
        """Copy what the optimizer works on, its state, DeepSpeed's counters and random streams.

        From an accelerator the copies run beside the next step, which waits for them before it updates.
        """
        self._tensors.capture(self._engine.training_state_tensors())
        self._counters = self._engine.counters()
        self._rng = RngState.capture()

    def restore(self) -> None:
        """Go back to the last capture. Optimizer state born since then is zeroed: so it is before its first
        step."""
        self._tensors.restore(self._engine.training_state_tensors())
        self._engine.sync_weights_from_masters()
        self._engine.set_counters(self._counters)
        assert self._rng is not None  # otherwise the tensors' snapshot has raised
        self._rng.restore()

    def free(self) -> None:
        """Give the memory back; the snapshot is of no further use."""
        self._end_waiting()
        self._tensors.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held on this rank."""
        return self._tensors.nbytes


def estimate_snapshot_bytes(training: TrainingConfig, parameters: int, replicas: int) -> int:
    """Bytes that one snapshot takes on each rank: fp32 parameters, be they masters or the weights, and
    AdamW's moments.

    Args:
        parameters: of the rank's part of the model (`Engine.parameters_held`).
        replicas: ranks that hold the same parameters; ZeRO shards masters and moments over them.
    """
    return math.ceil(12 * parameters / (replicas if training.zero_stage else 1))
