"""Choice of tokens, and the end of completions."""

from __future__ import annotations

import pytest
import torch

from megatron_adalrs.inference.sampling import Sampling, complete
from tests.inference.test_decoder import VOCABULARY, model_of

LOGITS = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))


def chosen(sampling: Sampling, draws: int = 4000) -> torch.Tensor:
    """Return the frequencies of the four tokens."""
    tokens = sampling.choose(LOGITS.expand(draws, -1), torch.Generator().manual_seed(0))
    return torch.bincount(tokens, minlength=4) / draws


def test_temperature_0_chooses_most_likely_token() -> None:
    assert chosen(Sampling()).tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(0.5), [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        (Sampling(1.0, top_k=2), [0.625, 0.375, 0.0, 0.0]),
        (Sampling(1.0, top_p=0.8), [0.625, 0.375, 0.0, 0.0]),
        (Sampling(1.0, top_p=0.81), [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0]),
        (Sampling(1.0, top_p=0.01), [1.0, 0.0, 0.0, 0.0]),
    ],
    ids=str,
)
def test_shares_are_those_of_the_kept_tokens(sampling: Sampling, expected: list[float]) -> None:
    found = chosen(sampling)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0.03)
    assert [share == 0 for share in found.tolist()] == [share == 0 for share in expected]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((-1.0,), "temperature: -1.0"),
        ((1.0, 0.0), "top_p: 0.0"),
        ((1.0, 1.5), "top_p: 1.5"),
        ((1.0, 1.0, -1), "top_k"),
    ],
)
def test_impossible_settings_are_refused(values: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Sampling(*values)


def test_greedy_completion_repeats_argmax() -> None:
    model = model_of("grouped")
    prompt = [4, 8, 15]
    expected = list(prompt)
    for _ in range(10):
        expected.append(int(model.logits(torch.tensor([expected]))[0, -1].argmax()))
    assert [tokens[0] for tokens in complete(model, prompt, 10, Sampling())] == expected[3:]


def test_completion_ends_at_eod_or_last_position() -> None:
    model = model_of("gpt2")
    whole = [tokens[0] for tokens in complete(model, [1, 2], 100, Sampling())]
    assert len(whole) == 24 - 2
    end = next(token for token in whole if token != whole[0])
    assert [tokens[0] for tokens in complete(model, [1, 2], 100, Sampling(), end=end)] == whole[
        : whole.index(end)
    ]
    with pytest.raises(ValueError, match="prompt: has 24 tokens: the model has 24 positions"):
        next(complete(model, list(range(24)), 1, Sampling()))
    with pytest.raises(ValueError, match="prompt: is empty"):
        next(complete(model, [], 1, Sampling()))


def test_samples_differ_and_a_seed_gives_them_again() -> None:
    model = model_of("llama")

    def samples(seed: int) -> list[tuple[int | None, ...]]:
        return list(zip(*complete(model, [5], 12, Sampling(1.0), samples=3, seed=seed), strict=True))

    assert samples(1) == samples(1) != samples(2)
    assert len(set(samples(1))) == 3
    ended = list(zip(*complete(model, [5], 12, Sampling(1.0), 3, 1, end=samples(1)[0][4]), strict=True))
    assert ended[0][4:] == (None,) * len(ended[0][4:])
    assert all(token is None or 0 <= token < VOCABULARY for sample in ended for token in sample)
