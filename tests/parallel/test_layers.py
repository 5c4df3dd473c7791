"""Parallel layers on one rank equal torch's; shards of parameters; impossible meshes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.distributed.process_mesh import MeshAxis
from megatron_adalrs.model.gpt import GPT, count_parameters
from megatron_adalrs.model.initialization import init_weights
from megatron_adalrs.parallel.cross_entropy import linear_cross_entropy
from megatron_adalrs.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    Shard,
    VocabularyParallelEmbedding,
    shard_of,
)
from megatron_adalrs.parallel.layout import Layout

VALUES = {
    "preset": "gpt2-tiny",
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "train_iters": 10,
    "lr": 1e-3,
    "data_path": "none",
}


def rank_of_two(rank: int) -> Layout:
    return Layout(tensor=MeshAxis(rank, 2))


@pytest.mark.parametrize(
    "layer",
    [ColumnParallelLinear(4, 6, True), RowParallelLinear(4, 6, True)],
    ids=["column", "row"],
)
def test_a_linear_layer_of_one_rank_is_one_node(layer: nn.Linear) -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    y, plain = layer(x), F.linear(x, layer.weight, layer.bias)
    assert torch.equal(y, plain)
    assert y.grad_fn.name() == plain.grad_fn.name()
    assert y.grad_fn.next_functions[0][0].name() == plain.grad_fn.next_functions[0][0].name()
    assert shard_of(layer.weight) is None and not hasattr(layer.weight, "tensor_model_parallel")


def test_an_embedding_of_one_rank_is_one_node() -> None:
    layer, tokens = VocabularyParallelEmbedding(10, 4), torch.tensor([[1, 9]])
    y = layer(tokens)
    assert torch.equal(y, F.embedding(tokens, layer.weight)) and y.grad_fn.name() == "EmbeddingBackward0"


def test_a_shard_takes_its_part_of_every_block() -> None:
    whole = torch.arange(8).unsqueeze(1)  # q: 0-3, k: 4-5, v: 6-7
    shards = [Shard(0, (4, 2, 2), rank, 2) for rank in range(2)]
    assert [shard.of(whole).flatten().tolist() for shard in shards] == [[0, 1, 4, 6], [2, 3, 5, 7]]
    assert shards[0].whole_shape((4, 1)) == (8, 1)
    assert Shard(1, (4,), 1, 2).of(torch.arange(8).view(2, 4)).tolist() == [[2, 3], [6, 7]]


@pytest.mark.parametrize("preset", ["gpt2-tiny", "qwen2-tiny"])
def test_two_shards_hold_the_parameters_of_the_whole(preset: str) -> None:
    config = config_from_values(VALUES | {"preset": preset, "num_query_groups": 2}).model
    whole, shards = (
        count_parameters(config, 256),
        [count_parameters(config, 256, rank_of_two(r)) for r in range(2)],
    )
    with torch.device("meta"):
        replicated = sum(
            p.numel() for p in GPT(config, 256, rank_of_two(0)).parameters() if shard_of(p) is None
        )
    assert shards[0] == shards[1]
    assert sum(shards) == whole + replicated


@pytest.mark.parametrize("vocabulary", [1, 13, 100, 250])
def test_loss_of_one_rank_matches_torch(vocabulary: int) -> None:
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(256, 8, requires_grad=True)
    targets = torch.randint(vocabulary, (9,))
    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, vocabulary), (hidden, weight))
    theirs = torch.autograd.grad(F.cross_entropy(hidden @ weight[:vocabulary].t(), targets), (hidden, weight))
    for mine, torchs in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, torchs)


def test_vocabulary_padding_changes_nothing() -> None:
    tokens, results = torch.randint(250, (2, 17)), []
    for multiple in (1, 128, 512):
        config = config_from_values(VALUES | {"make_vocab_size_divisible_by": multiple}).model
        model = GPT(config, 250)
        init_weights(model, config, seed=3)
        assert model.output_weight.shape[0] == config.padded_vocab_size(250)
        results.append((model(tokens), model.logits(tokens[:, :-1])))
    for loss, logits in results:
        assert logits.shape == (2, 16, 250)
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(logits, results[0][1])
        torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def test_the_vocabulary_is_padded_to_equal_parts() -> None:
    config = config_from_values(VALUES).model
    assert [config.padded_vocab_size(257, ranks) for ranks in (1, 2, 3, 4)] == [384, 512, 384, 512]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tensor_model_parallel_size": 3}, r"num_attention_heads: 4 is not divisible .*: 4 = 1 x 3 \+ 1"),
        (
            {"tensor_model_parallel_size": 4, "num_query_groups": 2},
            r"num_query_groups: 2 is not divisible by tensor_model_parallel_size: 2 = 0 x 4 \+ 2",
        ),
        (
            {"tensor_model_parallel_size": 2, "ffn_hidden_size": 65},
            r"ffn_hidden_size: 65 .*: 65 = 32 x 2 \+ 1",
        ),
        (
            {"tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 15},
            r"seq_length: 15 is not divisible .*: 15 = 7 x 2 \+ 1",
        ),
        (
            {"tensor_model_parallel_size": 2, "context_parallel_size": 4},
            r"num_attention_heads: 4 is not divisible by .* x context_parallel_size: 4 = 0 x 8 \+ 4",
        ),
        (
            {"context_parallel_size": 2, "seq_length": 15},
            r"seq_length: 15 is not divisible by context_parallel_size: 15 = 7",
        ),
        (
            {
                "tensor_model_parallel_size": 2,
                "context_parallel_size": 2,
                "sequence_parallel": True,
                "seq_length": 18,
            },
            r"seq_length: 18 is not divisible by .* x context_parallel_size: 18 = 4 x 4 \+ 2",
        ),
        ({"sequence_parallel": True}, "sequence_parallel: splits the sequence over the tensor ranks"),
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size: 0"),
    ],
)
def test_an_impossible_division_shows_the_arithmetic(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_values(VALUES | values)
