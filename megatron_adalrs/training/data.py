"""The data of a run: training batches, evaluations, and what identifies their order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron_adalrs.checkpoint.train_state import TrainState, count_samples
from megatron_adalrs.config import Config
from megatron_adalrs.data import blend as corpora
from megatron_adalrs.data.blend import Blend, Datasets, Part
from megatron_adalrs.data.gpt_dataset import GPTDataset
from megatron_adalrs.data.loader import BatchLoader, SampleDataset
from megatron_adalrs.distributed.collectives import on_every_rank, on_first_rank
from megatron_adalrs.training.evaluation import Evaluation
from megatron_adalrs.training.resolve import ResolvedRun

DIGEST_SAMPLES = 65536
"""Number of samples, at most, whose order is hashed to identify the order of the data."""


@dataclass(frozen=True)
class TrainingData:
    """Data that a run trains on and is evaluated on."""

    run: ResolvedRun
    blend: Blend
    """Samples of all corpora in the order of training."""
    batches: BatchLoader
    """This rank's share of every global batch."""
    evaluations: list[list[Evaluation]]
    """Evaluations of each corpus, for every split that has documents: validation first, then test."""

    def order_digest(self, samples: int) -> str:
        """Return a digest of the order of the first samples."""
        return self.blend.order_digest(min(samples, DIGEST_SAMPLES))

    @cached_property
    def order(self) -> str:
        """Digest of the order of all samples that the run consumes."""
        return self.order_digest(self.run.train_samples)

    def identity(self, consumed_samples: int) -> dict[str, Any]:
        """Return what a run must share with a checkpoint beyond its configuration.

        Args:
            consumed_samples: Position in the data at the checkpoint.
        """
        data_order = self.order_digest(consumed_samples)
        tokenizer = self.run.tokenizer
        return {
            "vocab_size": self.run.vocab_size,
            "tokenizer_sha256": tokenizer.sha256 if tokenizer else None,
            "blend": self.blend.shares,
            "data_order": data_order,
        }

    def close(self) -> None:
        """Stop the threads that read batches."""
        self.batches.close()
        for corpora_of_split in self.evaluations:
            for evaluation in corpora_of_split:
                evaluation.loader.close()


def build_data(run: ResolvedRun, state: TrainState) -> TrainingData:
    """Build the index caches on the first rank, and open them on all ranks. Collective.

    Raises:
        ValueError: A corpus cannot be read or has too few documents; raised on every rank.
    """
    config = run.config
    skipped_samples = count_samples(state.skipped_samples)
    on_first_rank(lambda: build_datasets(config, run.global_batch_size, skipped_samples) and None)
    datasets = on_every_rank(lambda: build_datasets(config, run.global_batch_size, skipped_samples))

    def evaluation(part: Part) -> Evaluation:
        batches = batches_in_one_pass(part.dataset, config.run.eval_iters, run.global_batch_size)
        return Evaluation(
            part.dataset.split, _loader(run, part.dataset), batches, part.name, float(part.share)
        )

    return TrainingData(
        run=run,
        blend=datasets.train,
        batches=_loader(run, datasets.train),
        evaluations=[
            [evaluation(part) for part in parts] for parts in (datasets.valid, datasets.test) if parts
        ],
    )


def build_datasets(config: Config, global_batch_size: int, skipped_samples: int = 0) -> Datasets:
    """Build the data sets of a run, or open them where their index caches exist.

    The training set has spare samples for those that the loss guard may skip, or has skipped in a resumed
    run. They do not change the order of the others.
    """
    train_iters = config.training.train_iters
    spare = max(config.loss_guard.max_skipped_batches(train_iters) * global_batch_size, skipped_samples)
    return corpora.build_datasets(
        config.data,
        config.model.seq_length,
        train_samples=train_iters * global_batch_size + spare,
        evaluated_samples=config.run.eval_iters * global_batch_size,
        seed=config.training.seed,
    )


def batches_in_one_pass(dataset: GPTDataset, limit: int, global_batch_size: int) -> int:
    """Return the number of global batches in one pass over the dataset: at least one, at most `limit`."""
    samples = (dataset.num_tokens - 1) // dataset.seq_length
    return max(1, min(limit, samples // global_batch_size))


def _loader(run: ResolvedRun, dataset: SampleDataset) -> BatchLoader:
    data = run.mesh.data
    return BatchLoader(dataset, run.config.training.micro_batch_size, data.rank, data.size, run.micro_batches)
