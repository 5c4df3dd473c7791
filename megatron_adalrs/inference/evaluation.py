"""Loss and perplexity on a corpus: every token is predicted once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from megatron_adalrs.data.indexed_dataset import IndexedDataset
from megatron_adalrs.model.documents import NOT_COUNTED
from megatron_adalrs.model.gpt import GPT


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation comes to."""

    loss: float
    """Mean over all predicted tokens, in nats."""
    error: float
    """Standard error of the loss, from that of the windows' losses; nan of a single window."""
    tokens: int
    """Predicted."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def windows(indexed: IndexedDataset, documents: range, length: int) -> Iterator[np.ndarray]:
    """The documents one after the other in windows of `length` + 1 tokens, int64.

    The last token of a window is the first of the next, so that all but the corpus's very first are predicted once;
    the last window may be shorter.
    """
    first, end = (int(indexed.document_offsets[bound]) for bound in (documents.start, documents.stop))
    for start in range(first, end - 1, length):
        yield indexed.tokens(start, min(length + 1, end - start)).astype(np.int64)


@torch.no_grad()
def evaluate(
    model: GPT,
    indexed: IndexedDataset,
    documents: range,
    length: int,
    batch_size: int,
    max_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> Evaluated:
    """The mean next-token loss of a model, each window seen by itself, over the tokens that counted in its training.

    Args:
        length: tokens that are predicted in a window, which is the most context that one has.
        batch_size: windows at a time.
        max_tokens: stop at the first window that reaches them; None: all.
        on_progress: told how many tokens were predicted, after every batch.

    Raises:
        ValueError: the documents have fewer than two tokens.
    """
    device = next(model.parameters()).device
    losses: list[float] = []
    sizes: list[int] = []
    batch: list[np.ndarray] = []

    def flush() -> None:
        if batch:
            tokens = torch.from_numpy(np.stack(batch)).to(device)
            logits = model.logits(tokens[:, :-1]).float()
            targets = model.documents.targets(tokens)
            each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=NOT_COUNTED)
            counted = (targets != NOT_COUNTED).sum(dim=1)
            losses.extend((each.double().sum(dim=1) / counted.clamp(min=1)).tolist())
            sizes.extend(counted.tolist())
            batch.clear()
            on_progress(sum(sizes))

    for window in windows(indexed, documents, length):
        if batch and len(window) != len(batch[0]):
            flush()
        batch.append(window)
        if len(batch) == batch_size:
            flush()
        if max_tokens is not None and sum(sizes) + sum(len(one) - 1 for one in batch) >= max_tokens:
            break
    flush()
    if not sum(sizes):
        raise ValueError(f"the documents of {indexed.prefix} have fewer than 2 tokens: nothing can be predicted")
    weights, found = np.array(sizes, dtype=np.float64), np.array(losses)
    share = weights / weights.sum()
    loss = float(share @ found)
    count = len(found)
    # Of a weighted mean of independent windows.
    error = math.sqrt(float(share**2 @ (found - loss) ** 2) * count / (count - 1)) if count > 1 else math.nan
    return Evaluated(loss, error, int(weights.sum()))
