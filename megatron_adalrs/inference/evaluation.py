"""Loss, perplexity and bits per byte on a corpus: every token is predicted once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_adalrs.data.indexed_dataset import IndexedDataset
from megatron_adalrs.data.tokenizer import Tokenizer
from megatron_adalrs.model.document_mask import IGNORE_INDEX
from megatron_adalrs.model.gpt import GPT

_MOST_HELD = 1_000_000  # tokens: a corpus without ends of documents is one text


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation comes to."""

    loss: float
    """Mean over all predicted tokens, in nats."""
    error: float
    """Standard error of the loss, from that of the windows' losses; nan of a single window."""
    tokens: int
    """Predicted."""
    bytes: int | None
    """Of the text that these tokens are, in UTF-8; None without a tokenizer."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """What models of different tokenizers are compared by; None where the bytes are unknown, or none."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None


class TextSize:
    """Bytes of the texts that tokens are, as they come: a character may lie across windows, not across
    documents.

    Ends of documents are no text. Without any end in a million tokens they are decoded by the million: the
    count may be a few bytes off at each cut.

    Args:
        apart: the tokens are from `windows_apart`: what looks like an end among them is spelled out in the
            text.
    """

    def __init__(self, tokenizer: Tokenizer, apart: bool = False) -> None:
        self._tokenizer, self._apart = tokenizer, apart
        self._document: list[int] = []
        self._bytes = 0

    def add(self, first: int, targets: np.ndarray) -> None:
        """The tokens [n] that follow the first one of a window; IGNORE_INDEX ones are passed over."""
        if first == self._tokenizer.eod:
            self._end()
        if self._apart:
            self._document += targets[targets != IGNORE_INDEX].tolist()
            self._bound()
            return
        for index, part in enumerate(np.split(targets, np.flatnonzero(targets == self._tokenizer.eod))):
            if index:
                self._end()
            self._document += part[(part != IGNORE_INDEX) & (part != self._tokenizer.eod)].tolist()
        self._bound()

    def _bound(self) -> None:
        if len(self._document) >= _MOST_HELD:
            self._end()

    def _end(self) -> None:
        self._bytes += len(self._tokenizer.decode(self._document).encode())
        self._document.clear()

    def total(self) -> int:
        """Of all that was added."""
        self._end()
        return self._bytes


class Window(NamedTuple):
    """A piece of text that is seen by itself."""

    tokens: np.ndarray
    """[n], int64."""
    predicted: int
    """So many of the last ones; the first n - predicted are context, at least one."""


def windows(indexed: IndexedDataset, documents: range, length: int) -> Iterator[Window]:
    """The documents one after the other, `length` predicted tokens at a time.

    The last token of a window is the first of the next, so that all but the corpus's very first are predicted
    once; the last window may be shorter.
    """
    first, end = (int(indexed.document_offsets[bound]) for bound in (documents.start, documents.stop))
    for start in range(first, end - 1, length):
        tokens = indexed.tokens(start, min(length + 1, end - start)).astype(np.int64)
        yield Window(tokens, len(tokens) - 1)


def windows_apart(indexed: IndexedDataset, documents: range, length: int, eod: int) -> Iterator[Window]:
    """Every document by itself, after an end-of-document token; its own, if it has one, is not predicted.

    The last window of a document is filled up with context, as lm_eval's rolling windows are.
    """
    for document in documents:
        tokens = np.concatenate([[eod], indexed.get_document(document)]).astype(np.int64)
        end = len(tokens) - int(tokens[-1] == eod)
        for start in range(0, end - 1, length):
            stop = min(start + length + 1, end)
            yield Window(tokens[max(stop - length - 1, 0) : stop], stop - start - 1)


def batches(windows: Iterable[Window], size: int, max_tokens: int | None) -> Iterator[list[Window]]:
    """Up to `size` neighbouring windows of one length, up to the window that reaches `max_tokens`."""
    batch: list[Window] = []
    tokens = 0
    for window in windows:
        if batch and (len(batch) == size or len(window.tokens) != len(batch[0].tokens)):
            yield batch
            batch = []
        batch.append(window)
        tokens += window.predicted
        if max_tokens is not None and tokens >= max_tokens:
            break
    if batch:
        yield batch


class _Tally:
    """What was predicted so far."""

    def __init__(self, tokenizer: Tokenizer | None, apart: bool) -> None:
        self.tokens = 0
        self._losses: list[float] = []  # of windows: mean over their tokens
        self._sizes: list[int] = []
        self._text = TextSize(tokenizer, apart) if tokenizer else None

    def add(self, losses: Tensor, targets: Tensor, first: list[int]) -> None:
        """Losses of targets [windows, length], and the first token of each window."""
        counted = (targets != IGNORE_INDEX).sum(dim=1)
        self._losses.extend((losses.double().sum(dim=1) / counted.clamp(min=1)).tolist())
        self._sizes.extend(counted.tolist())
        self.tokens += int(counted.sum())
        if self._text:
            for token, predicted in zip(first, targets.cpu().numpy(), strict=True):
                self._text.add(token, predicted)

    def evaluated(self) -> Evaluated:
        sizes, losses = np.array(self._sizes, dtype=np.float64), np.array(self._losses)
        share = sizes / sizes.sum()
        loss = float(share @ losses)
        count = len(losses)
        # Of a weighted mean of independent windows.
        error = (
            math.sqrt(float(share**2 @ (losses - loss) ** 2) * count / (count - 1)) if count > 1 else math.nan
        )
        return Evaluated(loss, error, self.tokens, self._text.total() if self._text else None)


@torch.no_grad()
def evaluate(
    model: GPT,
    indexed: IndexedDataset,
    documents: range,
    length: int,
    batch_size: int,
    max_tokens: int | None = None,
    tokenizer: Tokenizer | None = None,
    apart_after: int | None = None,
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> Evaluated:
    """The mean next-token loss of a model, each window seen by itself, over the tokens that counted in its
    training.

    Args:
        length: tokens that are predicted in a window, which is the most context that one has.
        batch_size: windows at a time.
        max_tokens: stop at the first window that reaches them; None: all.
        tokenizer: what the tokens are of, to count the bytes of their text.
        apart_after: the end-of-document token, for `windows_apart`; None: `windows`.
        on_progress: told how many tokens were predicted, after every batch.

    Raises:
        ValueError: there is nothing to predict in the documents.
    """
    device = next(model.parameters()).device
    tally = _Tally(tokenizer, apart_after is not None)
    if apart_after is None:
        found = windows(indexed, documents, length)
    else:
        found = windows_apart(indexed, documents, length, apart_after)
    for batch in batches(found, batch_size, max_tokens):
        tokens = torch.from_numpy(np.stack([window.tokens for window in batch])).to(device)
        logits = model.logits(tokens[:, :-1]).float()
        context = torch.tensor([[logits.shape[1] - window.predicted] for window in batch], device=device)
        is_context = torch.arange(logits.shape[1], device=device) < context
        targets = model.documents.targets(tokens).masked_fill(is_context, IGNORE_INDEX)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORE_INDEX)
        tally.add(losses, targets, [int(window.tokens[0]) for window in batch])
        on_progress(tally.tokens)
    if not tally.tokens:
        raise ValueError(
            f"the documents of {indexed.prefix} have fewer than 2 tokens: nothing can be predicted"
        )
    return tally.evaluated()
