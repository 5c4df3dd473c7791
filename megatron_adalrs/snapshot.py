"""The engine's in-memory checkpoint: everything that decides the following steps, captured and put back in place."""

from __future__ import annotations

import math
from typing import Any

from megatron_adalrs.adalrs.tensor_snapshot import TensorSnapshot
from megatron_adalrs.config import TrainingConfig
from megatron_adalrs.engine import Engine
from megatron_adalrs.random_state import random_state, set_random_state


class EngineSnapshot:
    """One point of a run to which the engine can go back, bit for bit.

    The buffers are allocated by the first capture and reused by later ones. Capture and restore only between steps, on
    all ranks together: each one keeps its own shard.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tensors = TensorSnapshot()
        self._counters: dict[str, Any] = {}
        self._random_state: dict[str, Any] = {}

    def capture(self) -> None:
        """Copy weights, masters, optimizer state, DeepSpeed's counters and random streams."""
        self._tensors.capture(self._engine.live_tensors())
        self._counters = self._engine.counters()
        self._random_state = random_state()

    def restore(self) -> None:
        """Go back to the last capture. Optimizer state born since then is zeroed: so it is before its first step."""
        self._tensors.restore(self._engine.live_tensors())
        self._engine.weights_changed()
        self._engine.set_counters(self._counters)
        set_random_state(self._random_state)

    @property
    def nbytes(self) -> int:
        """Bytes held on this rank."""
        return self._tensors.nbytes


def estimate_snapshot_bytes(training: TrainingConfig, parameters: int, data_parallel_size: int) -> int:
    """Bytes that one snapshot takes on each rank: weights, fp32 masters and AdamW's two moments.

    Args:
        parameters: of the model; along a tensor axis, of the rank's part (`Engine.parameters_held`).

    In fp32 without ZeRO the optimizer works on the weights themselves; otherwise it has masters of its own, which ZeRO
    shards over the data-parallel ranks. ZeRO-3 shards the weights too.
    """
    shards = data_parallel_size if training.zero_stage else 1
    weights = (2 if training.bf16 else 4) * parameters / (shards if training.zero_stage == 3 else 1)
    has_masters = training.bf16 or training.zero_stage > 0
    return math.ceil(weights + (12 if has_masters else 8) * parameters / shards)
