"""Loss, perplexity and bits per byte of a model on a corpus. Every token is predicted once."""

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

_MAX_BUFFERED_TOKENS = 1_000_000  # a corpus without end-of-document tokens is one long text


@dataclass(frozen=True)
class Evaluated:
    """Result of an evaluation."""

    loss: float
    """Mean over all predicted tokens, in nats."""
    error: float
    """Standard error of the loss, estimated from the losses of the windows; nan for a single window."""
    tokens: int
    """Number of predicted tokens."""
    bytes: int | None
    """Size of the predicted text in UTF-8; None without a tokenizer."""

    @property
    def perplexity(self) -> float:
        """exp(loss), or infinity if it overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Loss in bits per byte of text, comparable between tokenizers; None if the size is unknown or 0."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None


class TextSize:
    """Size in bytes of a text, computed from its tokens window by window.

    A character may span windows, but not documents. End-of-document tokens do not count as text. A document
    of more than a million tokens is decoded in pieces, which may change the size by a few bytes per piece.

    Args:
        apart: The tokens come from `windows_apart`, where end-of-document tokens inside a window are part of
            the text.
    """

    def __init__(self, tokenizer: Tokenizer, apart: bool = False) -> None:
        self._tokenizer, self._apart = tokenizer, apart
        self._document: list[int] = []
        self._bytes = 0

    def add(self, first: int, targets: np.ndarray) -> None:
        """Add the targets of a window.

        Args:
            first: First token of the window.
            targets: The tokens after it, [n]; those equal to IGNORE_INDEX do not count.
        """
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
        if len(self._document) >= _MAX_BUFFERED_TOKENS:
            self._end()

    def _end(self) -> None:
        self._bytes += len(self._tokenizer.decode(self._document).encode())
        self._document.clear()

    def total(self) -> int:
        """Return the size of all text that was added."""
        self._end()
        return self._bytes


class Window(NamedTuple):
    """A piece of text that is evaluated independently of others."""

    tokens: np.ndarray
    """[n], int64."""
    predicted: int
    """Number of predicted tokens at the end; the first n - predicted, at least one, are context."""


def windows(indexed: IndexedDataset, documents: range, length: int) -> Iterator[Window]:
    """Yield windows of `length` predicted tokens over the concatenated documents.

    The last token of a window is the first of the next one, so that all tokens but the first are predicted
    once. The last window may be shorter.
    """
    first, end = (int(indexed.document_offsets[bound]) for bound in (documents.start, documents.stop))
    for start in range(first, end - 1, length):
        tokens = indexed.tokens(start, min(length + 1, end - start)).astype(np.int64)
        yield Window(tokens, len(tokens) - 1)


def windows_apart(indexed: IndexedDataset, documents: range, length: int, eod: int) -> Iterator[Window]:
    """Yield windows over each document separately, after an end-of-document token.

    The document's own end-of-document token is not predicted. The last window of a document is filled with
    context, like the rolling windows of lm_eval.
    """
    for document in documents:
        tokens = np.concatenate([[eod], indexed.get_document(document)]).astype(np.int64)
        end = len(tokens) - int(tokens[-1] == eod)
        for start in range(0, end - 1, length):
            stop = min(start + length + 1, end)
            yield Window(tokens[max(stop - length - 1, 0) : stop], stop - start - 1)


def batches(windows: Iterable[Window], size: int, max_tokens: int | None) -> Iterator[list[Window]]:
    """Yield batches of up to `size` windows of equal length, until `max_tokens` are predicted."""
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
    """Losses and text of the windows evaluated so far."""

    def __init__(self, tokenizer: Tokenizer | None, apart: bool) -> None:
        self.tokens = 0
        self._losses: list[float] = []  # of windows: mean over their tokens
        self._sizes: list[int] = []
        self._text = TextSize(tokenizer, apart) if tokenizer else None

    def add(self, losses: Tensor, targets: Tensor, first: list[int]) -> None:
        """Add the losses of targets [windows, length]; `first` are the first tokens of the windows."""
        counted = (targets != IGNORE_INDEX).sum(dim=1)
        self._losses.extend((losses.double().sum(dim=1) / counted.clamp(min=1)).tolist())
        self._sizes.extend(counted.tolist())
        self.tokens += int(counted.sum())
        if self._text:
            for token, predicted in zip(first, targets.cpu().numpy(), strict=True):
                self._text.add(token, predicted)

    def evaluated(self) -> Evaluated:
        """Return the result over all windows."""
        sizes, losses = np.array(self._sizes, dtype=np.float64), np.array(self._losses)
        share = sizes / sizes.sum()
        loss = float(share @ losses)
        count = len(losses)
        # Standard error of a weighted mean of independent windows.
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
    """Compute the mean next-token loss of a model over the tokens that count in its training.

    Args:
        length: Predicted tokens in a window, which is also the maximum context.
        batch_size: Windows in a batch.
        max_tokens: Stop after the window that reaches this number of tokens; None evaluates all.
        tokenizer: Tokenizer of the corpus, to count the bytes of the text.
        apart_after: End-of-document token for `windows_apart`; None selects `windows`.
        on_progress: Called with the number of predicted tokens after every batch.

    Raises:
        ValueError: The documents have no token to predict.
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
