from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adalrs.data.sample_index import SampleIndex, build_sample_index

lengths_lists = st.lists(st.integers(0, 12), min_size=1, max_size=12)


def build(
    lengths: list[int], seq_length: int, num_samples: int, seed: int = 0, stream: int = 0
) -> SampleIndex:
    return build_sample_index(
        np.array(lengths, dtype=np.int64),
        first_document=100,
        seq_length=seq_length,
        num_samples=num_samples,
        seed=seed,
        stream=stream,
    )


def stream_of(index: SampleIndex, lengths: list[int]) -> list[tuple[int, int]]:
    """Every (document, offset) of the documents in order, one token at a time."""
    return [
        (document, offset)
        for document in index.documents.tolist()
        for offset in range(lengths[document - 100])
    ]


@settings(max_examples=150, deadline=None)
@given(
    lengths=lengths_lists,
    seq_length=st.integers(1, 9),
    num_samples=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_against_a_walk_through_the_tokens(
    lengths: list[int], seq_length: int, num_samples: int, seed: int
) -> None:
    lengths = [*lengths, seq_length + 1]  # so that there is enough for one sample
    index = build(lengths, seq_length, num_samples, seed)
    tokens = stream_of(index, lengths)
    boundaries = [(int(index.documents[place]), offset) for place, offset in index.samples.tolist()]
    assert boundaries == [tokens[i * seq_length] for i in range(len(boundaries))]

    per_epoch = sum(lengths)
    epoch_of = [i * seq_length // per_epoch for i in range(len(boundaries) - 1)]
    documents = index.documents.tolist()
    for start in range(0, len(documents) - len(lengths) + 1, len(lengths)):
        epoch = documents[start : start + len(lengths)]
        assert sorted(epoch) == list(range(100, 100 + len(lengths)))

    served = index.shuffle.tolist()
    assert len(served) == num_samples == len(set(served))
    assert [epoch_of[sample] for sample in served] == sorted(epoch_of)[:num_samples]


@settings(max_examples=50, deadline=None)
@given(lengths=lengths_lists, seq_length=st.integers(1, 9), epochs=st.integers(1, 4))
def test_whole_epochs_serve_every_token(lengths: list[int], seq_length: int, epochs: int) -> None:
    lengths = [*lengths, seq_length + 1]
    num_samples = -(-epochs * sum(lengths) // seq_length)
    index = build(lengths, seq_length, num_samples)
    tokens = stream_of(index, lengths)
    inputs = [
        tokens[position]
        for sample in index.shuffle.tolist()
        for position in range(sample * seq_length, (sample + 1) * seq_length)
    ]
    counts = {token: inputs.count(token) for token in set(tokens)}
    assert len(counts) == sum(lengths)
    assert min(counts.values()) >= epochs
    assert sum(counts.values()) - epochs * sum(lengths) < seq_length


@settings(max_examples=50, deadline=None)
@given(lengths=lengths_lists, few=st.integers(1, 30), more=st.integers(0, 30))
def test_more_samples_continue_the_order_of_fewer(lengths: list[int], few: int, more: int) -> None:
    lengths = [*lengths, 5]
    short, long = build(lengths, 4, few), build(lengths, 4, few + more)
    assert long.shuffle[:few].tolist() == short.shuffle.tolist()
    assert long.samples[: len(short.samples)].tolist() == short.samples.tolist()
    assert long.documents[: len(short.documents)].tolist() == short.documents.tolist()


def test_seed_and_stream_change_the_order() -> None:
    lengths = list(range(1, 60))
    orders = {tuple(build(lengths, 4, 100, seed, stream).shuffle) for seed in (0, 1) for stream in (0, 1)}
    assert len(orders) == 4
    assert tuple(build(lengths, 4, 100, 1, 1).shuffle) in orders


def test_documents_are_shuffled_anew_every_epoch() -> None:
    lengths = [4] * 50
    documents = build(lengths, 4, 100).documents.tolist()
    assert documents[:50] != documents[50:100]
    assert sorted(documents[:50]) == sorted(documents[50:100])


def test_order_is_the_one_that_was_published() -> None:
    # Numbers of this version's order: a change breaks the resumption of runs and must raise _ORDER_VERSION.
    index = build([5, 0, 7, 3], 4, 6, seed=1234)
    assert index.documents.tolist() == [101, 100, 102, 103, 103, 101, 102, 100, 100]
    assert index.samples.tolist() == [[1, 0], [1, 4], [2, 3], [3, 0], [4, 1], [6, 2], [6, 6], [7, 3], [8, 2]]
    assert index.shuffle.tolist() == [1, 3, 2, 0, 4, 7]
