"""Small configurations and batches for distributed tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.config import Config
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine import Engine, build_engine
from megatron_adalrs.snapshot.rng_state import seed_everything
from megatron_adalrs.training.build import build_trainer
from tests.helpers.settings import TWO_LAYERS

VOCABULARY = 50


def tiny_config(**values: Any) -> Config:
    """Return the configuration of a tiny model: two micro-batches of two samples on each of two ranks."""
    defaults = {
        "preset": "gpt2-tiny",
        **TWO_LAYERS,
        "train_iters": 100,
        "lr": 1e-2,
        "data_path": "none",
        "micro_batch_size": 2,
        "global_batch_size": 8,
    }
    return config_from_values(defaults | values)


def mesh_of(config: Config) -> ProcessMesh:
    """Return this rank's position in the mesh of a configuration, with process groups."""
    return ProcessMesh.from_environment(**config.parallel.sizes).with_groups()


def start(values: dict[str, Any]) -> tuple[Config, ProcessMesh, Engine]:
    """Build the engine of a run and set its first learning rate."""
    config = tiny_config(**values)
    mesh = mesh_of(config)
    seed_everything(config.training.seed, mesh.tensor_group)
    engine = build_engine(config, VOCABULARY, mesh)
    engine.set_lr(config.optimizer.lr)
    return config, mesh, engine


def micro_batches(config: Config, mesh: ProcessMesh, step: int) -> list[np.ndarray]:
    """Return this rank's micro-batches of a step: sequences that count from random starts.

    The global batch is the same for any mesh.
    """
    size, micro = config.global_batch_size(mesh.data.size), config.training.micro_batch_size
    starts = np.random.default_rng(step).integers(0, VOCABULARY, (size, 1))
    samples = (starts + np.arange(config.model.seq_length + 1)) % VOCABULARY
    return list(samples.reshape(-1, mesh.data.size, micro, config.model.seq_length + 1)[:, mesh.data.rank])


def refusal(config: dict[str, Any]) -> str:
    """Return the error of a run that cannot start, or "accepted"."""
    try:
        build_trainer(config_from_values(config)).close("end", "")
    except ValueError as error:
        return str(error)
    return "accepted"
