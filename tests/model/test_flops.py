"""Floating-point operations per token against the formula, for tied and untied output matrices."""

from __future__ import annotations

from megatron_adalrs.model.flops import flops_per_token
from megatron_adalrs.model.gpt import count_parameters
from tests.model.models import model_config


def test_flops_of_a_known_shape() -> None:
    config = model_config("gpt2-tiny")
    parameters = count_parameters(config, 64)
    positions, attention = 12 * 32, 12 * 2 * 4 * 8 * 12
    assert flops_per_token(config, parameters, 64) == 6 * (parameters - positions) + attention
    untied = model_config("llama-tiny", untie_embeddings_and_output_weights=True)
    parameters = count_parameters(untied, 64)
    assert flops_per_token(untied, parameters, 64) == 6 * (parameters - 64 * 32) + attention
