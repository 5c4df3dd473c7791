"""The training engine. No other package imports DeepSpeed.

deepspeed_import.py   import of DeepSpeed without its banner and warnings
process_group.py      start and end of the process group, properties of the accelerator
extension_locks.py    locks of DeepSpeed's compiled operators that a killed process left
deepspeed_config.py   DeepSpeed's configuration from the flags and the user's file
deepspeed_sections.py sections and keys of the user's file that are known and supported
base.py               Engine: the part that both engines share; steps, saving, loading
loss_average.py       average of the loss over ranks
learning_rate.py      writes the learning rate into the optimizer; DeepSpeed's range test
data_parallel.py      DataParallelEngine: DeepSpeed's data-parallel engine, ZeRO 0-3
pipeline.py           PipelineParallelEngine: DeepSpeed's PipelineEngine, ZeRO 0-1
mpu.py                the mesh in the form that DeepSpeed expects
update_gate.py        refusal of an update before it is made
training_state.py     tensors and counters that decide the following steps
master_weights.py     weights recomputed from the optimizer's fp32 masters
checkpoint_io.py      DeepSpeed's checkpoint files, written directly or from a copy in the background
saved_weights.py      weights in the files that an engine of any mesh saved
saved_optimizer.py    masters and optimizer state in the same files
reshard.py            writes these into an engine of another mesh
"""

from __future__ import annotations

import megatron_adalrs.engine.deepspeed_import  # noqa: F401  isort: skip  (before every import of DeepSpeed)

from megatron_adalrs.config import Config
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine.base import Engine, StepResult, reduce_bucket_size
from megatron_adalrs.engine.data_parallel import DataParallelEngine
from megatron_adalrs.engine.deepspeed_import import show_library_messages
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
from megatron_adalrs.engine.saved_optimizer import SavedMesh, open_training_state
from megatron_adalrs.engine.saved_weights import SavedWeights
from megatron_adalrs.model.initialization import WeightSource

__all__ = [
    "DataParallelEngine",
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
    "open_training_state",
    "reduce_bucket_size",
    "require_supported",
    "show_library_messages",
    "stage_bounds",
]


def build_engine(
    config: Config, vocab_size: int, mesh: ProcessMesh, weights: WeightSource | None = None
) -> Engine:
    """Build the engine for the mesh, with initial weights. Collective.

    Args:
        config: the configuration of the run.
        vocab_size: size of the vocabulary before padding.
        mesh: the process mesh with its groups.
        weights: source of the initial weights; None draws them from the seed.
    """
    engine = PipelineParallelEngine if mesh.pipe.size > 1 else DataParallelEngine
    return engine(config, vocab_size, mesh, weights)
