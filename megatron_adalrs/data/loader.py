"""Batch loader: micro-batches as a pure function of the number of consumed samples."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

MicroBatches = list[npt.NDArray[np.int64]]


class SampleDataset(Protocol):
    """Dataset with items int64[seq_length + 1], which are read from a second thread."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> npt.NDArray[np.int64]: ...


class BatchLoader:
    """Loader of a data-parallel rank's part of every global batch, with one step of read-ahead.

    A global batch has `global_batch_size` = micro_batch_size * data_parallel_size * micro_batches_per_step
    consecutive samples. Micro-batch j of rank r has `micro_batch_size` of them, from
    (j * data_parallel_size + r) * micro_batch_size on. Therefore all ranks together read the same samples at
    a position for any number of ranks, and returning to a position gives the same batches.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        micro_batches_per_step: int,
    ) -> None:
        sizes = {
            "micro_batch_size": micro_batch_size,
            "data_parallel_size": data_parallel_size,
            "micro_batches_per_step": micro_batches_per_step,
        }
        for field, value in sizes.items():
            if value < 1:
                raise ValueError(f"{field} {value}: required at least 1")
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(
                f"data_parallel_rank {data_parallel_rank}: required 0 to {data_parallel_size - 1}"
            )
        self.global_batch_size = micro_batch_size * data_parallel_size * micro_batches_per_step
        self._dataset = dataset
        self._micro_batch_size = micro_batch_size
        self._offsets = [
            (j * data_parallel_size + data_parallel_rank) * micro_batch_size
            for j in range(micro_batches_per_step)
        ]
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-loader")
        self._ahead: tuple[int, Future[MicroBatches]] | None = None

    def micro_batches(self, consumed_samples: int) -> MicroBatches:
        """Return this rank's micro-batches of the step that starts at `consumed_samples`.

        Returns:
            `micro_batches_per_step` arrays int64[micro_batch_size, seq_length + 1], owned by the caller.

        Raises:
            ValueError: If the global batch is not within the dataset; also any error of reading it.
        """
        if consumed_samples < 0 or not self._is_inside(consumed_samples):
            raise ValueError(
                f"consumed_samples({consumed_samples}) + global batch({self.global_batch_size}): "
                f"required within 0 to {len(self._dataset)}, the samples of the dataset"
            )
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == consumed_samples:
            batches = ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].cancel()
            batches = self._read(consumed_samples)
        following = consumed_samples + self.global_batch_size
        if self._is_inside(following):
            self._ahead = following, self._executor.submit(self._read, following)
        return batches

    def close(self) -> None:
        """Stop the background thread. The loader cannot be used afterwards."""
        self._executor.shutdown(cancel_futures=True)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_inside(self, position: int) -> bool:
        return position + self.global_batch_size <= len(self._dataset)

    def _read(self, position: int) -> MicroBatches:
        starts = [position + offset for offset in self._offsets]
        return [
            np.stack([self._dataset[number] for number in range(start, start + self._micro_batch_size)])
            for start in starts
        ]
