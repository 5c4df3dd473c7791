"""The loss on held-out data: of each corpus, and their mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_adalrs.data.loader import BatchLoader
from megatron_adalrs.engine import Engine


@dataclass(frozen=True)
class Evaluation:
    """Part of a corpus that the loss is measured on: its first `batches` global batches."""

    split: str
    loader: BatchLoader
    batches: int
    name: str = ""
    share: float = 1.0
    """Of the corpus in the mean over all that are evaluated with it."""

    def steps(self) -> Iterator[list[Any]]:
        return (
            self.loader.micro_batches(index * self.loader.global_batch_size) for index in range(self.batches)
        )


def evaluated(engine: Engine, corpora: Sequence[Evaluation]) -> Iterator[tuple[str, float]]:
    """Names of curves and mean losses, in nats per token: SPLIT/NAME of each where there are several corpora,
    and last SPLIT, their mean by their shares. Collective."""
    mean = 0.0
    for corpus in corpora:
        loss = engine.evaluate(corpus.steps())
        mean += corpus.share * loss if corpus.share else 0.0
        if len(corpora) > 1:
            yield f"{corpus.split}/{corpus.name}", loss
    yield corpora[0].split, mean
