"""The training engine. Only the files of this package import deepspeed: what it is like is known here and
nowhere else.

build_lock.py           locks of DeepSpeed's compiled operators that a killed process left behind
checkpoint_files.py     DeepSpeed's checkpoint files, written at once or from a copy in the background
process.py              the import, the process group, memory
data_parallel.py        Engine: DeepSpeed's own engine, ZeRO 0-3, and everything that both engines share
pipeline.py             PipelineParallelEngine: DeepSpeed's PipelineEngine, ZeRO 0-1
saved_weights.py        weights alone, from what an engine of any mesh saved
saved_optimizer.py      masters and optimizer state from the same
mesh_change.py          these, written into an engine of another mesh
update_gate.py          an update refused before it is made
masters.py              weights made anew from the optimizer's masters
model_parallel_unit.py  the mesh in DeepSpeed's words
"""

from __future__ import annotations

from megatron_adalrs.config import Config
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine.data_parallel import Engine, StepResult, reduce_bucket_size
from megatron_adalrs.engine.pipeline import PipelineParallelEngine, stage_bounds
from megatron_adalrs.engine.process_group import (
    computes_on_cpu,
    deepspeed_version,
    end_distributed,
    init_distributed,
    memory_bytes,
    require_supported,
)
from megatron_adalrs.engine.reshard import TrainingTensors
from megatron_adalrs.engine.saved_optimizer import SavedMesh, open_training
from megatron_adalrs.engine.saved_weights import SavedWeights
from megatron_adalrs.model.gpt import WeightSource

__all__ = [
    "Engine",
    "PipelineParallelEngine",
    "SavedMesh",
    "SavedWeights",
    "StepResult",
    "TrainingTensors",
    "build_engine",
    "computes_on_cpu",
    "deepspeed_version",
    "end_distributed",
    "init_distributed",
    "memory_bytes",
    "open_training",
    "reduce_bucket_size",
    "require_supported",
    "stage_bounds",
]


def build_engine(
    config: Config, vocab_size: int, mesh: ProcessMesh, weights: WeightSource | None = None
) -> Engine:
    """The engine that the mesh calls for, with initial weights. Collective.

    Args:
        vocab_size: before padding.
        weights: where initial weights come from; None: they are drawn.
    """
    kind = PipelineParallelEngine if mesh.pipe.size > 1 else Engine
    return kind(config, vocab_size, mesh, weights)
