"""The fused loss against torch's, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_adalrs.parallel import cross_entropy
from megatron_adalrs.parallel.cross_entropy import linear_cross_entropy


def inputs(
    tokens: int, vocabulary: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 16, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), generator=generator)


@pytest.mark.parametrize("rows", [1, 7, 1000], ids=["row by row", "ragged chunks", "one chunk"])
@pytest.mark.parametrize("vocabulary", [2, 301])
def test_equals_torch(monkeypatch: pytest.MonkeyPatch, vocabulary: int, rows: int) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", rows * vocabulary)
    hidden, weight, targets = inputs(40, vocabulary, torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets)
    (3 * loss).backward()
    gradients = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    expected = F.cross_entropy(hidden @ weight.t(), targets)
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradients, (hidden.grad, weight.grad), rtol=1e-5, atol=1e-7)


def test_bfloat16_is_as_close_as_its_rounding() -> None:
    hidden, weight, targets = inputs(50, 101, torch.bfloat16)
    linear_cross_entropy(hidden, weight, targets).backward()
    exact_hidden, exact_weight = (t.detach().float().requires_grad_() for t in (hidden, weight))
    F.cross_entropy(exact_hidden @ exact_weight.t(), targets).backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad.float(), exact_hidden.grad, rtol=0.05, atol=2e-3)
    torch.testing.assert_close(weight.grad.float(), exact_weight.grad, rtol=0.05, atol=2e-3)


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.full((2, 4), 100.0)
    weight = torch.tensor([[100.0] * 4, [-100.0] * 4])
    assert linear_cross_entropy(hidden, weight, torch.tensor([0, 0])).item() == 0.0
    assert linear_cross_entropy(hidden, weight, torch.tensor([1, 1])).item() == pytest.approx(80000.0)


def test_a_loss_that_is_not_a_number_stays_one() -> None:
    hidden = torch.tensor([[float("nan")] * 4])
    assert linear_cross_entropy(hidden, torch.ones(3, 4), torch.tensor([0])).isnan()


def test_a_second_backward_is_an_error() -> None:
    loss = linear_cross_entropy(*inputs(4, 5, torch.float32))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward"):
        loss.backward()


def test_float16_gradients_do_not_underflow() -> None:
    """A token's share of a mean over many tokens is below float16's smallest number without a loss scale."""
    tokens, vocabulary, scale = 1 << 14, 64, 2.0**16
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(tokens, 8, generator=generator),
        torch.randn(vocabulary, 8, generator=generator),
    )
    targets = torch.randint(vocabulary, (tokens,), generator=generator)

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight)]
        (linear_cross_entropy(*inputs, targets) * scale).backward()
        return [tensor.grad.float() for tensor in inputs]

    for found, expected in zip(gradients(torch.float16), gradients(torch.float32), strict=True):
        assert float((found - expected).norm() / expected.norm()) < 2e-3
