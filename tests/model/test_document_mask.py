"""Document masks against Megatron-LM's, and packed documents against documents in samples of their own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.config import Config
from megatron_adalrs.model.document_mask import IGNORE_INDEX, DocumentMasking
from megatron_adalrs.model.gpt import GPT
from megatron_adalrs.model.initialization import init_weights

EOD = 7
ALL = DocumentMasking(EOD, attention=True, positions=True, loss=True)
SHAPES = {
    "gpt2": {"preset": "gpt2-tiny", "hidden_size": 32},
    "llama": {"preset": "llama-tiny", "hidden_size": 32, "num_query_groups": 2},
}


def config(shape: str, **values: Any) -> Config:
    common = {"num_layers": 2, "num_attention_heads": 4, "seq_length": 24, "train_iters": 1, "lr": 1.0}
    return config_from_values(common | SHAPES[shape] | {"data_path": "d"} | values)


def model(shape: str, documents: DocumentMasking, **values: Any) -> GPT:
    of = config(shape, **values).model
    gpt = GPT(of, 50, documents=documents)
    init_weights(gpt, of, seed=1)
    with torch.no_grad():  # so that attention and positions matter
        for parameter in gpt.parameters():
            parameter.mul_(5.0 if parameter.dim() > 1 else 1.0)
    return gpt


def sample() -> torch.Tensor:
    """Return [2, 25] tokens: documents of 5, 9, 1 and 10 tokens, and of 12, 12 and 1 tokens."""
    tokens = torch.randint(8, 50, (2, 25), generator=torch.Generator().manual_seed(0))
    tokens[0, [4, 13, 14]] = EOD
    tokens[1, [11, 23]] = EOD
    return tokens


def resets(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the result of Megatron-LM's function: attention mask, positions and loss mask."""
    sees = torch.ones(*data.shape, data.shape[1]).tril()
    positions = torch.arange(data.shape[1]).repeat(len(data), 1)
    for row, tokens in enumerate(data):
        begin = 0
        for end in (tokens == EOD).nonzero().flatten().tolist():
            sees[row, end + 1 :, : end + 1] = 0
            positions[row, end + 1 :] -= end + 1 - begin
            begin = end + 1
    return sees.bool(), positions, data != EOD


def test_masks_and_positions_are_those_of_megatron() -> None:
    tokens = sample()
    sees, positions, counts = resets(tokens[:, :-1])
    inputs = ALL.attention_inputs(ALL.document_ids(tokens[:, :-1]), torch.float32)
    assert torch.equal(inputs.mask[:, 0] == 0, sees)
    assert torch.equal(inputs.mask[:, 0].isinf(), ~sees)
    assert torch.equal(inputs.positions, positions)
    assert torch.equal(ALL.targets(tokens), tokens[:, 1:].where(counts, IGNORE_INDEX))
    loss_only = DocumentMasking(EOD, loss=True)
    assert loss_only.attention_inputs(ALL.document_ids(tokens), torch.float32) == (None, None)


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_documents_have_their_own_logits(shape: str) -> None:
    tokens, gpt = sample(), model(shape, ALL)
    packed = gpt.logits(tokens[:, :24])
    for row, cuts in enumerate(([0, 5, 14, 15, 24], [0, 12, 24])):
        for begin, end in pairwise(cuts):
            alone = gpt.logits(tokens[row : row + 1, begin:end])
            torch.testing.assert_close(packed[row, begin:end], alone[0], atol=1e-5, rtol=0)
    plain = model(shape, DocumentMasking()).logits(tokens[:, :24])
    torch.testing.assert_close(packed[0, :5], plain[0, :5], atol=1e-5, rtol=0)
    assert (packed[0, 5:] - plain[0, 5:]).abs().max() > 0.01


def test_positions_alone_and_attention_alone() -> None:
    tokens = sample()[:, :24]
    for shape, documents in (
        ("gpt2", DocumentMasking(EOD, positions=True)),
        ("llama", DocumentMasking(EOD, attention=True)),
    ):
        logits = model(shape, documents).logits(tokens)
        assert (logits - model(shape, DocumentMasking()).logits(tokens)).abs().max() > 0.01
    # Rotary positions are relative: where attention is reset, resetting them too changes nothing but
    # rounding.
    both, attention = (
        model("llama", DocumentMasking(EOD, attention=True, positions=p)).logits(tokens)
        for p in (True, False)
    )
    torch.testing.assert_close(both, attention, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_ignored_targets_have_no_loss_or_gradient(shape: str) -> None:
    tokens, gpt = sample(), model(shape, ALL)
    loss = gpt(tokens)
    loss.backward()
    counts = tokens[:, :-1] != EOD
    assert int(counts.sum()) == 48 - 5
    gradients = [parameter.grad.clone() for parameter in gpt.parameters()]
    gpt.zero_grad()
    each = F.cross_entropy(gpt.logits(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
    expected = (each * counts).sum() / 48
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for gradient, parameter in zip(gradients, gpt.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-3)
