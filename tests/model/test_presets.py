"""Published shapes have the published number of parameters."""

from __future__ import annotations

import pytest

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.config.model import PresetName
from megatron_adalrs.model.gpt import count_parameters
from megatron_adalrs.model.presets import PRESETS

# From the models' own checkpoints (the number of elements of their tensors, tied ones counted once).
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameter_counts(name: str, parameters: int) -> None:
    unpadded = {"make_vocab_size_divisible_by": 1}
    model = config_from_values(
        {"preset": name, "train_iters": 1, "lr": 1.0, "data_path": "d"} | unpadded
    ).model
    assert count_parameters(model, model.vocab_size) == parameters


def test_every_preset_is_a_choice() -> None:
    assert set(PRESETS) == set(PresetName.__args__)
