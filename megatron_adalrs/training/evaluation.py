"""Loss on held-out data: of each corpus, and their weighted mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_adalrs.data.loader import BatchLoader, MicroBatches
from megatron_adalrs.engine import Engine


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of one corpus on its first `batches` global batches."""

    split: str
    loader: BatchLoader
    batches: int
    name: str = ""
    share: float = 1.0
    """Weight of the corpus in the mean over all corpora of the split; the weights add up to 1."""

    def steps(self) -> Iterator[MicroBatches]:
        """Return an iterator over this rank's micro-batches of every global batch."""
        return (
            self.loader.micro_batches(index * self.loader.global_batch_size) for index in range(self.batches)
        )


def evaluated(engine: Engine, corpora: Sequence[Evaluation]) -> Iterator[tuple[str, float]]:
    """Evaluate all corpora of a split. Collective.

    Yields:
        Name and mean loss in nats per token: `SPLIT/NAME` of each corpus if there are several, and at the end
        `SPLIT` with their weighted mean.
    """
    mean = 0.0
    for corpus in corpora:
        loss = engine.evaluate(corpus.steps())
        mean += corpus.share * loss if corpus.share else 0.0
        if len(corpora) > 1:
            yield f"{corpus.split}/{corpus.name}", loss
    yield corpora[0].split, mean
