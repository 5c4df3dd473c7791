"""Sample tokens from logits, and complete prompts token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_adalrs.inference.decoder import Decoder, max_positions
from megatron_adalrs.model.gpt import GPT


@dataclass(frozen=True)
class Sampling:
    """Rule for the choice of the next token."""

    temperature: float = 0.0
    """Divisor of the logits; 0 always takes the most likely token."""
    top_p: float = 1.0
    """Nucleus sampling (arXiv 1904.09751): the most likely tokens that together have this probability."""
    top_k: int = 0
    """Number of most likely tokens to sample from; 0 means all."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: {self.temperature}: must be 0 or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p}: must be above 0 and at most 1")
        if self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k}: must be 0 or above")

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Choose a token for each row of logits.

        Args:
            logits: [b, vocabulary].

        Returns:
            [b], int64.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits.float() / self.temperature
        if self.top_k and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(dim=-1)
        if self.top_p < 1:
            ranked, order = probabilities.sort(dim=-1, descending=True)
            # A token is excluded if more likely ones already reach the probability; the first never is.
            excluded = ranked.cumsum(dim=-1) - ranked >= self.top_p
            probabilities = probabilities.masked_fill(excluded.gather(-1, order.argsort(dim=-1)), 0.0)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def complete(
    model: GPT,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    samples: int = 1,
    seed: int = 0,
    end: int | None = None,
) -> Iterator[list[int | None]]:
    """Complete a prompt token by token.

    Args:
        prompt: At least one token.
        samples: Number of completions.
        end: Token that ends a sample; it is not returned.

    Yields:
        The next token of each sample, or None once it has ended.

    Raises:
        ValueError: The prompt is empty, or too long for the model to add a token.
    """
    room = max_positions(model) - len(prompt)
    if not prompt:
        raise ValueError("prompt: is empty: must have at least one token")
    if room < 1:
        raise ValueError(f"prompt: has {len(prompt)} tokens: the model has {max_positions(model)} positions")
    # The model need not process the last token that is returned.
    decoder = Decoder(model, samples, len(prompt) + min(max_new_tokens, room))
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    logits = decoder(torch.tensor([list(prompt)] * samples, device=device))
    running = [True] * samples
    for number in range(min(max_new_tokens, room)):
        chosen = sampling.choose(logits, generator)
        tokens = chosen.tolist()
        running = [going and token != end for going, token in zip(running, tokens, strict=True)]
        if not any(running):
            return
        yield [token if going else None for going, token in zip(running, tokens, strict=True)]
        if number + 1 < min(max_new_tokens, room):
            logits = decoder(chosen[:, None])
