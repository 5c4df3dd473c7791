"""Small models of the tests."""

from __future__ import annotations

from typing import Any

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.config import ModelConfig
from megatron_adalrs.model.gpt import GPT
from megatron_adalrs.model.initialization import init_weights

SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 12}


def model_config(preset: str, **values: Any) -> ModelConfig:
    run = {"train_iters": 10, "lr": 1e-3, "data_path": "d", "preset": preset}
    return config_from_values(run | SMALL | values).model


def build(preset: str, **values: Any) -> tuple[GPT, ModelConfig]:
    config = model_config(preset, **values)
    model = GPT(config, 64)
    init_weights(model, config, seed=3)
    return model, config
