"""Whether a checkpoint is of this run's model, grid and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_adalrs.config import Config
from megatron_adalrs.parallel.topology import Grid

SHAPE_FREE = {"preset", "vocab_size", "seq_length", "attention_dropout", "hidden_dropout", "init_method_std"}


def require_fitting(checkpoint: Path, state: dict[str, Any], config: Config, grid: Grid) -> None:
    """Check that a checkpoint can be loaded into the model that `config` describes.

    Raises:
        ValueError: naming the field, the checkpoint's value and this run's.
    """
    saved = state["config"]
    for name, value in config.model.model_dump(mode="json").items():
        default = type(config.model).model_fields[name].default
        if name not in SHAPE_FREE and saved.get(name, default) != value:
            raise ValueError(f"--load: {checkpoint} has {name} {saved.get(name, default)!r}, this run has {value!r}")
    for name in ("zero_stage", "bf16", "fp16"):
        if saved.get(name, False) != getattr(config.training, name):
            raise ValueError(
                f"--load: {checkpoint} was written with {name} {saved.get(name)!r}, this run has "
                f"{getattr(config.training, name)!r}; use the same"
            )
    for name, value in config.parallel.model_dump(mode="json").items():
        default = type(config.parallel).model_fields[name].default
        if saved.get(name, default) != value:
            raise ValueError(
                f"--load: {checkpoint} was written with {name} {saved.get(name, default)!r}, this run has {value!r}; "
                "use the same"
            )
    if state["world_size"] != grid.world_size:
        raise ValueError(
            f"--load: {checkpoint} was written by {state['world_size']} ranks, this run has {grid.world_size}; "
            "launch as many"
        )


def require_identity(checkpoint: Path, state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Check that a run has the vocabulary of a checkpoint and sees the data that it saw in the same order.

    Raises:
        ValueError: naming what differs.
    """
    saved = state["identity"]
    if saved["vocab_size"] != identity["vocab_size"]:
        raise ValueError(
            f"--load: {checkpoint} has vocab_size {saved['vocab_size']}, this run has {identity['vocab_size']}"
        )
    if saved["data_order"] != identity["data_order"]:
        raise ValueError(
            f"--load: {checkpoint} saw its data in order {saved['data_order']}, this run's is "
            f"{identity['data_order']}: "
            "data_path, split, seed and seq_length must be those of the checkpoint"
        )
