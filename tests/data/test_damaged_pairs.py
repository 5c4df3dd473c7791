"""Mutated .bin/.idx pairs and index caches: what is read is right as far as a file without a checksum can
tell."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_adalrs.data.index_cache import load_or_build
from megatron_adalrs.data.indexed_dataset import HEADER as HEADER_LAYOUT
from megatron_adalrs.data.indexed_dataset import IndexedDataset
from megatron_adalrs.data.indexed_dataset_builder import IndexedDatasetBuilder
from megatron_adalrs.data.sample_index import SampleIndex
from tests.data.test_indexed_dataset import BIN, IDX, write_pair
from tests.helpers.mutations import mutated

FUZZING = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZING
@given(index=mutated(IDX), tokens=st.one_of(st.just(BIN), mutated(BIN)))
def test_a_mutated_pair_is_refused_or_read_correctly(tmp_path: Path, index: bytes, tokens: bytes) -> None:
    try:
        dataset = IndexedDataset(write_pair(tmp_path / "x", index, tokens))
    except ValueError as error:
        assert str(error).startswith(f"{tmp_path}/x.") and "\n" not in str(error)
        return
    # What passes is whole: written anew it is the same bytes, so every token of it is where it belongs.
    assert dataset.num_tokens * dataset.dtype.itemsize == len(tokens)
    with IndexedDatasetBuilder(tmp_path / "again", dataset.dtype) as builder:
        for document in range(dataset.num_documents):
            first, last = dataset.document_indices[document : document + 2]
            builder.add_document(dataset.get_document(document), dataset.sizes[first:last])
        builder.finalize()
    assert (tmp_path / "again.idx").read_bytes() == index and (tmp_path / "again.bin").read_bytes() == tokens


@pytest.mark.parametrize("sequences", [10**15, 2**63, 2**64 - 1])
@pytest.mark.parametrize("documents", [1, 10**15, 2**64 - 1])
def test_a_header_that_claims_too_much_costs_no_memory(
    tmp_path: Path, sequences: int, documents: int
) -> None:
    index = HEADER_LAYOUT.pack(b"MMIDIDX\x00\x00", 1, 8, sequences, documents) + IDX[HEADER_LAYOUT.size :]
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=rf"x\.idx has 114 bytes: required \d+ for its {sequences} sequences and"
        ):
            IndexedDataset(write_pair(tmp_path / "x", index))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_lengths_beyond_the_file_are_refused(tmp_path: Path) -> None:
    longest = 2**31 - 1
    lengths, pointers = (
        struct.pack("<4i", *[longest] * 4),
        struct.pack("<4q", *(2 * longest * i for i in range(4))),
    )
    index = IDX[:34] + lengths + pointers + IDX[34 + 16 + 32 :]
    with pytest.raises(ValueError, match=rf"x\.bin has 12 bytes, but .*x\.idx describes {8 * longest}"):
        IndexedDataset(write_pair(tmp_path / "x", index))


@FUZZING
@given(data=st.data())
def test_a_damaged_index_cache_is_built_anew(tmp_path: Path, data: st.DataObject) -> None:
    for (
        left_over
    ) in tmp_path.iterdir():  # by another example: damage that changes nothing, such as a blank, stays
        left_over.unlink()
    index = SampleIndex(np.arange(3), np.arange(6).reshape(3, 2), np.array([1, 0]))
    load_or_build(tmp_path, "train", {"seed": 1}, lambda: index)
    file = data.draw(st.sampled_from(sorted(tmp_path.iterdir())))
    file.write_bytes(data.draw(mutated(file.read_bytes())))
    found = load_or_build(tmp_path, "train", {"seed": 1}, lambda: index)
    for name in ("documents", "samples", "shuffle"):
        assert np.array_equal(getattr(found, name), getattr(index, name))
