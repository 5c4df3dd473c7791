"""Small configurations and batches that distributed tests share."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_adalrs.arguments import config_from_values
from megatron_adalrs.build import build_trainer
from megatron_adalrs.config import Config
from megatron_adalrs.engine import Engine, build_engine
from megatron_adalrs.parallel.topology import Grid
from megatron_adalrs.random_state import seed_everything

VOCABULARY = 50


def tiny_config(**values: Any) -> Config:
    """Two layers of width 32, sequences of 16, two micro-batches of two samples on each of two ranks."""
    defaults = {
        "preset": "gpt2-tiny", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16,
        "train_iters": 100, "lr": 1e-2, "data_path": "none", "micro_batch_size": 2, "global_batch_size": 8,
    }  # fmt: skip
    return config_from_values(defaults | values)


def grid_of(config: Config) -> Grid:
    """This rank's place in the grid that a configuration asks for, with groups, which a rank makes once."""
    return Grid.from_environment(**config.parallel.sizes).with_groups()


def start(values: dict[str, Any]) -> tuple[Config, Grid, Engine]:
    """A run before its first step."""
    config = tiny_config(**values)
    grid = grid_of(config)
    seed_everything(config.training.seed, grid.tensor_group)
    engine = build_engine(config, VOCABULARY, grid)
    engine.set_lr(config.optimizer.lr)
    return config, grid, engine


def micro_batches(config: Config, grid: Grid, step: int) -> list[np.ndarray]:
    """This rank's micro-batches of a step: counting from random starts. The global batch is the same for any grid."""
    size, micro = config.global_batch_size(grid.data.size), config.training.micro_batch_size
    starts = np.random.default_rng(step).integers(0, VOCABULARY, (size, 1))
    samples = (starts + np.arange(config.model.seq_length + 1)) % VOCABULARY
    return list(samples.reshape(-1, grid.data.size, micro, config.model.seq_length + 1)[:, grid.data.rank])


def refusal(config: dict[str, Any]) -> str:
    """Why a run cannot begin, or "accepted"."""
    try:
        build_trainer(config_from_values(config)).close("end", "")
    except ValueError as error:
        return str(error)
    return "accepted"
