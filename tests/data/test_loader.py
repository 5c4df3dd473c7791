from __future__ import annotations

import threading

import numpy as np
import pytest

from megatron_adalrs.data.loader import BatchLoader


class Numbers:
    """Sample i is [i, i]; it remembers what was read, and can be told to fail."""

    def __init__(self, length: int, broken: int | None = None) -> None:
        self.length, self.broken = length, broken
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> np.ndarray:
        if number == self.broken:
            raise OSError(f"sample {number} cannot be read")
        self.read.append(number)
        return np.full(2, number, dtype=np.int64)


def numbers(batches: list[np.ndarray]) -> list[int]:
    return [int(number) for batch in batches for number in batch[:, 0]]


@pytest.mark.parametrize("data_parallel_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_all_ranks_together_read_the_same_global_batch(
    data_parallel_size: int, micro_batch_size: int
) -> None:
    micro_batches = 8 // (data_parallel_size * micro_batch_size)
    seen = []
    for rank in range(data_parallel_size):
        with BatchLoader(Numbers(64), micro_batch_size, rank, data_parallel_size, micro_batches) as loader:
            assert loader.global_batch_size == 8
            for position in (0, 8, 24):
                batches = loader.micro_batches(position)
                assert [batch.shape for batch in batches] == [(micro_batch_size, 2)] * micro_batches
                assert all(batch.dtype == np.int64 for batch in batches)
                seen += numbers(batches)
    assert sorted(seen) == [*range(16), *range(24, 32)]


def test_micro_batches_by_hand() -> None:
    with BatchLoader(
        Numbers(64), 2, data_parallel_rank=1, data_parallel_size=2, micro_batches_per_step=3
    ) as loader:
        assert [batch[:, 0].tolist() for batch in loader.micro_batches(12)] == [[14, 15], [18, 19], [22, 23]]


def test_going_back_gives_the_same_batches() -> None:
    with BatchLoader(Numbers(40), 2, 0, 1, 2) as loader:
        first = [numbers(loader.micro_batches(position)) for position in (0, 4, 8, 12)]
        again = [numbers(loader.micro_batches(position)) for position in (4, 8, 12, 0)]
    assert again == [*first[1:], first[0]]


def test_batches_belong_to_the_caller() -> None:
    with BatchLoader(Numbers(40), 2, 0, 1, 2) as loader:
        loader.micro_batches(0)[0][:] = -1
        assert numbers(loader.micro_batches(0)) == [0, 1, 2, 3]


def test_the_next_step_is_prepared_and_only_that() -> None:
    samples = Numbers(40)
    with BatchLoader(samples, 2, 0, 1, 2) as loader:
        loader.micro_batches(0)
        loader.micro_batches(4)
    assert set(samples.read) <= set(range(12))
    assert samples.read[:8] == list(range(8))


def test_the_last_step_is_served_and_nothing_after_it() -> None:
    with BatchLoader(Numbers(10), 2, 0, 1, 2) as loader:
        assert numbers(loader.micro_batches(4)) == [4, 5, 6, 7]
        for position in (8, -4):
            with pytest.raises(
                ValueError,
                match=rf"consumed_samples\({position}\) \+ global batch\(4\): required within 0 to 10",
            ):
                loader.micro_batches(position)
        assert numbers(loader.micro_batches(6)) == [6, 7, 8, 9]


def test_a_thread_error_is_raised_for_its_batch() -> None:
    with BatchLoader(Numbers(40, broken=6), 2, 0, 1, 2) as loader:
        loader.micro_batches(0)
        with pytest.raises(OSError, match="sample 6 cannot be read"):
            loader.micro_batches(4)
        assert numbers(loader.micro_batches(8)) == [8, 9, 10, 11]
        loader.micro_batches(0)
        assert numbers(loader.micro_batches(12)) == [12, 13, 14, 15]


def test_close_ends_the_thread() -> None:
    before = threading.active_count()
    loader = BatchLoader(Numbers(40), 2, 0, 1, 2)
    loader.micro_batches(0)
    loader.close()
    loader.close()
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 1, 1), "micro_batch_size 0: required at least 1"),
        ((1, 0, 0, 1), "data_parallel_size 0: required at least 1"),
        ((1, 0, 1, 0), "micro_batches_per_step 0: required at least 1"),
        ((1, 2, 2, 1), "data_parallel_rank 2: required 0 to 1"),
        ((1, -1, 2, 1), "data_parallel_rank -1: required 0 to 1"),
    ],
)
def test_sizes_out_of_range_are_refused(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchLoader(Numbers(40), *arguments)
