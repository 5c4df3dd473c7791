"""Logits with cached keys and values equal those of the full sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.inference.decoder import Decoder, max_positions
from megatron_adalrs.model.gpt import GPT
from megatron_adalrs.model.initialization import init_weights
from megatron_adalrs.model.presets import PRESETS

VOCABULARY = 61
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": PRESETS["gpt2-tiny"] | {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4},
    "llama": PRESETS["llama-tiny"] | {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4},
    "scaled": PRESETS["llama-tiny"]
    | {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "use_rope_scaling": True,
        "rope_scaling_original_max_position_embeddings": 8,
    },
    "grouped": PRESETS["qwen2-tiny"]
    | {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2},
}


def model_of(shape: str, **changes: Any) -> GPT:
    config = ModelConfig(
        **(
            SHAPES[shape]
            | {"seq_length": 24, "max_position_embeddings": 24, "init_method_std": 0.2}
            | changes
        )
    )
    model = GPT(config, VOCABULARY)
    init_weights(model, config, seed=3)
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [[1] * 12, [5, 1, 3, 1, 2], [12]], ids=["one by one", "pieces", "at once"])
def test_logits_equal_those_of_full_sequence(shape: str, steps: list[int]) -> None:
    model = model_of(shape)
    tokens = torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    expected = model.logits(tokens)
    decoder = Decoder(model, 3, 12)
    for count in steps:
        first = decoder.length
        found = decoder(tokens[:, first : first + count])
        torch.testing.assert_close(found, expected[:, decoder.length - 1], rtol=1e-5, atol=1e-5)
    assert decoder.length == 12


def test_more_tokens_than_positions_are_refused() -> None:
    model = model_of("llama")
    assert max_positions(model) == 24
    with pytest.raises(ValueError, match="25 tokens: the model has 24 positions"):
        Decoder(model, 1, 25)
