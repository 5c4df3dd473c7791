"""Micro-batches as a pure function of the samples consumed so far."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

MicroBatches = list[npt.NDArray[np.int64]]


class SampleDataset(Protocol):
    """Anything with a length whose items are int64[seq_length + 1]; read from a second thread."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> npt.NDArray[np.int64]: ...


class BatchLoader:
    """One data-parallel rank's share of every global batch, at any position and with one step prepared ahead.

    A global batch is `global_batch_size` = micro_batch_size * data_parallel_size * micro_batches_per_step
    consecutive samples; micro-batch j of rank r takes the `micro_batch_size` of them from (j *
    data_parallel_size + r) * micro_batch_size on. So all ranks together read the same samples at a position
    for any number of ranks, and going back to a position gives the same batches.
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
        """This rank's `micro_batches_per_step` arrays int64[micro_batch_size, seq_length + 1] for the step
        that starts at `consumed_samples`; the arrays are the caller's to keep.

        Raises ValueError if the global batch does not lie in the dataset, and whatever reading it raises.
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
        """Stop the background thread; the loader is spent afterwards."""
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
