"""Unsupported models and damaged folders are refused with the name of the field or file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.config.model import RopeScaling
from megatron_adalrs.huggingface.config_json import Shape, family_of
from megatron_adalrs.huggingface.reader import HuggingFaceModel
from megatron_adalrs.huggingface.rope_config import rotary_json
from tests.huggingface.models import change_config, saved

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 10000.0,
}
CANNOT = "this scaling is not supported, required rope_type llama3 or default"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "mistral"}, "model_type: 'mistral': required one of gpt2, llama, qwen2"),
    ("llama", {"model_type": None}, "model_type: None: required one of"),
    (
        "llama",
        {"architectures": ["LlamaModel"]},
        "architectures: ['LlamaModel']: required ['LlamaForCausalLM']",
    ),
    (
        "llama",
        {"quantization_config": {"bits": 4}},
        "quantization_config: {'bits': 4}: not supported",
    ),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, f"rope_scaling: 'linear': {CANNOT}"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, f"rope_scaling: 'dynamic': {CANNOT}"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        f"rope_parameters: 'yarn': {CANNOT}",
    ),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, f"rope_parameters: 'longrope': {CANNOT}"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "llama3"}},
        "rope_parameters.factor: None: must be a number above 0",
    ),
    (
        "llama",
        {"rope_parameters": LLAMA3 | {"factor": 0.5}},
        "rope_parameters.factor: 0.5: must be at least 1",
    ),
    (
        "llama",
        {"rope_parameters": LLAMA3 | {"factor": "8"}},
        "rope_parameters.factor: '8': must be a number above 0",
    ),
    (
        "llama",
        {"rope_parameters": LLAMA3 | {"low_freq_factor": 4}},
        "low_freq_factor: 4: must be below high_freq",
    ),
    (
        "llama",
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 0.5}},
        "0.5: must be a whole number",
    ),
    (
        "llama",
        {"rope_parameters": LLAMA3 | {"beta_fast": 32}},
        "not supported for rope_type llama3: beta_fast",
    ),
    (
        "llama",
        {"rope_parameters": {"full_attention": LLAMA3}},
        "not supported for rope_type default: full_attention",
    ),
    ("llama", {"rope_scaling": LLAMA3}, "they contradict each other"),
    (
        "llama",
        {"rope_scaling": LLAMA3 | {"factor": 32.0}, "rope_parameters": LLAMA3},
        "they contradict each other",
    ),
    (
        "llama",
        {"rope_scaling": LLAMA3 | {"type": "linear"}},
        "{'rope_type': 'llama3', 'type': 'linear'}: they contra",
    ),
    ("llama", {"rope_parameters": LLAMA3, "rope_theta": 5e5}, "'rope_parameters': 10000.0}: they contradict"),
    (
        "llama",
        {"rope_parameters": LLAMA3, "original_max_position_embeddings": 4096},
        "embeddings: 4096: rotary pos",
    ),
    ("llama", {"rope_scaling": 2.0}, "rope_scaling: 2.0: must be an object with parameters"),
    (
        "llama",
        {"rope_theta": 7.0},
        "rope_theta: {'rope_theta': 7.0, 'rope_parameters': 10000.0}: they contradict",
    ),
    ("llama", {"rope_theta": 10**400, "rope_parameters": None}, "0: must be a number above 0"),
    ("llama", {"rope_theta": -1.0, "rope_parameters": None}, "rope_theta: -1.0: must be a number above 0"),
    (
        "llama",
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor: 0.5: partial rotation is not supported",
    ),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "required partial_rotary_factor 1"),
    ("llama", {"attention_bias": True}, "mlp_bias: False: required attention_bias, which is True"),
    (
        "llama",
        {"hidden_act": "gelu"},
        'hidden_act: \'gelu\': not supported, required "silu" or "swish"',
    ),
    ("llama", {"num_key_value_heads": 4}, "is not divisible by num_key_value_heads: 6 = 1 x 4 + 2"),
    (
        "llama",
        {"head_dim": 5},
        "kv_channels: rotary positions rotate pairs, so the head size must be even, not 5",
    ),
    (
        "llama",
        {"head_dim": None, "num_attention_heads": 5},
        "hidden_size: 24: is not divisible by num_attention_heads",
    ),
    ("llama", {"vocab_size": "257"}, "vocab_size: '257': must be a whole number above 0"),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps: 0: must be a number above 0"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings: 'no': must be true or false"),
    (
        "qwen2",
        {"use_sliding_window": True},
        "use_sliding_window: True: not supported, required false",
    ),
    (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types: ['full_attention', 'sliding_att",
    ),
    ("gpt2", {"activation_function": "gelu"}, "activation_function: 'gelu': not supported"),
    (
        "gpt2",
        {"scale_attn_weights": False},
        "scale_attn_weights: False: not supported, required true",
    ),
    (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx: True: not supported",
    ),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention: True: not supported"),
    ("gpt2", {"n_head": 5}, "n_embd: 24: is not divisible by n_head: 24 = 4 x 5 + 4"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = {"llama": "llama untied", "qwen2": "qwen2 tied", "gpt2": "gpt2 tied"}
    return {name: saved(tmp_path_factory.mktemp("models") / name, kind) for name, kind in kinds.items()}


def refusal(folder: Path, read: Callable[[Path], Any] = HuggingFaceModel) -> str:
    with pytest.raises(ValueError) as error:
        read(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    return message


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_unsupported_configuration_is_refused(
    folders: dict[str, Path], tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    folder = shutil.copytree(folders[name], tmp_path / "model")
    change_config(folder, **changes)
    told = refusal(folder)
    assert told.startswith(f"{folder}/config.json: ") and message in told


def test_both_formats_of_rotary_base_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["qwen2"], tmp_path / "model")
    for changes, base in [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3e5}}, 3e5),
        ({"rope_parameters": None, "rope_theta": 2e5, "rope_scaling": None}, 2e5),
        ({"rope_parameters": None, "rope_theta": 2e5, "rope_scaling": {"type": "default"}}, 2e5),
        ({"rope_parameters": None, "rope_theta": None, "rope_scaling": None}, 1e4),
    ]:
        change_config(folder, **changes)
        fields = Shape(folder).fields
        assert (fields["rotary_base"], fields["use_rope_scaling"]) == (base, False)


def test_both_formats_of_rope_scaling_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    without_base = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    old = {name: value for name, value in without_base.items() if name != "rope_type"} | {"type": "llama3"}
    for changes in [
        {"rope_parameters": LLAMA3},
        {"rope_parameters": LLAMA3, "rope_scaling": without_base, "rope_theta": 1e4},
        {"rope_parameters": None, "rope_scaling": without_base, "rope_theta": 1e4},
        {"rope_parameters": None, "rope_scaling": old | {"factor": 8}, "rope_theta": 10000},
    ]:
        change_config(folder, **{"rope_scaling": None, "rope_theta": None} | changes)
        found = HuggingFaceModel(folder).model
        assert (found.rotary_base, found.rope_scaling) == (1e4, RopeScaling(8.0, 1.0, 4.0, 8192))
        told = rotary_json(found)
        assert told == {"rope_parameters": LLAMA3, "rope_scaling": without_base, "rope_theta": 1e4}


def test_damaged_folder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    def copy() -> tuple[Path, Path]:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        folder = shutil.copytree(folders["llama"], tmp_path / "model")
        return folder, folder / "model.safetensors"

    folder, file = copy()
    tensors = load_file(file)
    query, head = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"

    def refused_with(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, file)
        return refusal(folder)

    assert refused_with({n: t for n, t in tensors.items() if n != query}) == f"{folder} has no tensor {query}"
    assert f"{query} has shape [60, 23], config.json says [60, 24]" in refused_with(
        tensors | {query: torch.zeros(60, 23)}
    )
    assert f"{query} has dtype I8: required one of F64, F32, F16, BF16" in refused_with(
        tensors | {query: tensors[query].to(torch.int8)}
    )
    norm = "model.layers.0.self_attn.q_norm.weight"
    assert f"has tensors that no LlamaForCausalLM of its shape has: {norm}" in refused_with(
        tensors | {norm: torch.ones(10)}
    )
    change_config(folder, tie_word_embeddings=True)
    assert "tie_word_embeddings: True: lm_head.weight is not the token embedding" in refused_with(tensors)
    save_file(tensors | {head: tensors["model.embed_tokens.weight"].clone()}, file)
    assert not HuggingFaceModel(folder).model.untie_embeddings_and_output_weights, (
        "there twice, it is the same"
    )

    folder, file = copy()
    file.write_bytes(file.read_bytes()[:-1])
    assert f"cannot read {file}: " in refusal(folder)
    file.write_bytes(b"no such format")
    assert f"cannot read {file}: " in refusal(folder)
    file.unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {query: "model-00001-of-00001.safetensors"}}))
    assert f"{folder} has no model-00001-of-00001.safetensors, which model.safetensors.index.json" in refusal(
        folder
    )
    for text in (
        "{",
        "[]",
        "{}",
        '{"weight_map": {"a": "../other/model.safetensors"}}',
        '{"weight_map": {"a": 1}}',
    ):
        index.write_text(text)
        assert f"cannot read {index}: " in refusal(folder)
    for text in ("{", "[]"):
        (folder / "config.json").write_text(text)
        assert f"cannot read {folder}/config.json: " in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "RMSNorm"}, "normalization: 'RMSNorm': gpt2, the nearest family, has 'LayerNorm'"),
        ({"swiglu": True}, "swiglu: True: gpt2, the nearest family, has False"),
        ({"num_query_groups": 2}, "num_query_groups: 2: gpt2, the nearest family, has 4"),
        ({"kv_channels": 4}, "kv_channels: 4: gpt2, the nearest family, has 8"),
        ({"add_qkv_bias": False}, "add_qkv_bias: False: gpt2, the nearest family, has True"),
        (
            {"position_embedding_type": "rope"},
            "normalization: 'LayerNorm': llama, the nearest family, has 'RMSNorm'",
        ),
        (
            {
                "position_embedding_type": "rope",
                "normalization": "RMSNorm",
                "swiglu": True,
                "add_qkv_bias": False,
            },
            "add_qkv_bias: False: llama, the nearest family, has True",
        ),
        (
            {
                "position_embedding_type": "rope",
                "normalization": "RMSNorm",
                "swiglu": True,
                "hidden_size": 30,
                "kv_channels": 8,
            },
            "hidden_size: 30: llama divides it into heads: 30 = 7 x 4 + 2",
        ),
    ],
)
def test_shape_without_family_is_refused(changes: dict[str, Any], message: str) -> None:
    shape = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 8}
    with pytest.raises(ValueError) as error:
        family_of(ModelConfig(**shape | changes))
    assert str(error.value) == message
