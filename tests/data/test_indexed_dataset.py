from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_adalrs.commands.check_data import main as check_data
from megatron_adalrs.data.gpt_dataset import build_gpt_datasets
from megatron_adalrs.data.indexed_dataset import DTYPES, IndexedDataset, best_dtype
from megatron_adalrs.data.indexed_dataset_builder import IndexedDatasetBuilder
from megatron_adalrs.preprocessing.merging import merge

# Documents [1, 2, 3], [] and [4, 5 | 6] as uint16, spelled out by hand from the format's description.
BIN = struct.pack("<6H", 1, 2, 3, 4, 5, 6)
HEADER = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 4, 4)
LENGTHS = struct.pack("<4i", 3, 0, 2, 1)
POINTERS = struct.pack("<4q", 0, 6, 6, 10)
DOCUMENTS = struct.pack("<4q", 0, 1, 2, 4)
IDX = HEADER + LENGTHS + POINTERS + DOCUMENTS


def write_pair(prefix: Path, index: bytes = IDX, tokens: bytes = BIN) -> Path:
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(tokens)
    return prefix


def test_reads_bytes_written_by_hand(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_pair(tmp_path / "hand"))
    assert len(dataset) == 4
    assert dataset.num_documents == 3
    assert dataset.num_tokens == 6
    assert dataset.dtype == np.uint16
    assert dataset.sizes.tolist() == [3, 0, 2, 1]
    assert dataset.document_indices.tolist() == [0, 1, 2, 4]
    assert dataset.document_offsets.tolist() == [0, 3, 3, 6]
    assert [dataset.get(sequence).tolist() for sequence in range(4)] == [[1, 2, 3], [], [4, 5], [6]]
    assert [dataset.get_document(document).tolist() for document in range(3)] == [[1, 2, 3], [], [4, 5, 6]]


def test_writes_the_bytes_written_by_hand(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "built", np.uint16) as builder:
        builder.add_document([1, 2, 3])
        builder.add_document([])
        builder.add_document(np.array([4, 5, 6], dtype=np.int64), lengths=[2, 1])
        builder.finalize()
    assert (tmp_path / "built.idx").read_bytes() == IDX
    assert (tmp_path / "built.bin").read_bytes() == BIN
    assert sorted(path.name for path in tmp_path.iterdir()) == ["built.bin", "built.idx"]


# A vector for each token type: its code, the struct format of a token, its name, and six tokens, its limits
# among them.
VECTORS = [
    (1, "B", "uint8", [0, 1, 127, 128, 254, 255]),
    (2, "b", "int8", [0, 1, -1, 127, -127, -128]),
    (3, "h", "int16", [0, 1, -1, 256, 32767, -32768]),
    (4, "i", "int32", [0, 1, -1, 65536, 2**31 - 1, -(2**31)]),
    (5, "q", "int64", [0, 1, -1, 2**32, 2**63 - 1, -(2**63)]),
    (6, "d", "float64", [0.0, 0.5, -1.0, 1e300, 2.0**-1074, float("inf")]),
    (7, "f", "float32", [0.0, 0.5, -1.0, 2.0**100, 2.0**-149, float("-inf")]),
    (8, "H", "uint16", [0, 1, 256, 32768, 65499, 65535]),
]


def vector(code: int, token: str, values: list) -> tuple[bytes, bytes]:
    """Index and tokens of three documents, [a b c], none and [d e | f], as the format's description spells
    them."""
    size = struct.calcsize(f"<{token}")
    index = b"MMIDIDX\x00\x00"
    index += struct.pack("<Q", 1)  # version
    index += struct.pack("<B", code)
    index += struct.pack("<QQ", 4, 4)  # sequences; document indices, one more than documents
    index += struct.pack("<4i", 3, 0, 2, 1)  # tokens in each sequence
    index += struct.pack("<4q", 0, 3 * size, 3 * size, 5 * size)  # byte where each starts
    index += struct.pack("<4q", 0, 1, 2, 4)  # first sequence of each document, and the end
    return index, struct.pack(f"<6{token}", *values)


def test_there_is_a_vector_for_every_code() -> None:
    assert [code for code, *_ in VECTORS] == list(DTYPES)


@pytest.mark.parametrize(
    ("code", "token", "name", "values"), VECTORS, ids=[name for _, _, name, _ in VECTORS]
)
def test_every_token_type_reads_and_writes_its_vector(
    tmp_path: Path, code: int, token: str, name: str, values: list
) -> None:
    index, tokens = vector(code, token, values)
    dataset = IndexedDataset(write_pair(tmp_path / "hand", index, tokens))
    assert dataset.dtype == np.dtype(name)
    assert dataset.sizes.tolist() == [3, 0, 2, 1]
    assert dataset.document_indices.tolist() == [0, 1, 2, 4]
    assert [dataset.get(sequence).tolist() for sequence in range(4)] == [
        values[:3],
        [],
        values[3:5],
        values[5:],
    ]
    assert [dataset.get_document(document).tolist() for document in range(3)] == [values[:3], [], values[3:]]
    with IndexedDatasetBuilder(tmp_path / "built", name) as builder:
        builder.add_document(np.array(values[:3], dtype=name))
        builder.add_document([])
        builder.add_document(np.array(values[3:], dtype=name), lengths=[2, 1])
        builder.finalize()
    assert (tmp_path / "built.idx").read_bytes() == index
    assert (tmp_path / "built.bin").read_bytes() == tokens


@pytest.mark.parametrize("modes", [[0, 0, 0, 0], [0, 1, 0, -1]])
def test_modes_of_a_multimodal_index_are_read(tmp_path: Path, modes: list[int]) -> None:
    dataset = IndexedDataset(write_pair(tmp_path / "x", IDX + struct.pack("4b", *modes)))
    assert dataset.modes is not None and dataset.modes.tolist() == modes
    assert [dataset.get_document(document).tolist() for document in range(3)] == [[1, 2, 3], [], [4, 5, 6]]
    assert dataset.document_indices.tolist() == [0, 1, 2, 4]


def test_other_modes_than_text_are_refused(tmp_path: Path) -> None:
    text = IndexedDataset(write_pair(tmp_path / "text", IDX + bytes(4)))
    text.require_text()
    IndexedDataset(write_pair(tmp_path / "plain")).require_text()
    write_pair(tmp_path / "image", IDX + bytes([0, 0, 1, 2]))
    refused = (
        r"image\.idx is multimodal: 2 of its 4 sequences are not text, the first of them sequence 2 with "
        "mode 1: required text"
    )
    with pytest.raises(ValueError, match=refused):
        build_gpt_datasets(tmp_path / "image", "1,0,0", 2, (1, 0, 0), 1)
    with pytest.raises(ValueError, match=refused):
        merge([tmp_path / "text", tmp_path / "image"], tmp_path / "merged")
    merge([tmp_path / "text", tmp_path / "plain"], tmp_path / "merged")
    assert IndexedDataset(tmp_path / "merged").modes is None
    assert build_gpt_datasets(tmp_path / "text", "1,0,0", 2, (1, 0, 0), 1)[0] is not None


def test_check_data_names_modes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_data([str(write_pair(tmp_path / "x", IDX + bytes([0, 0, 1, 0])))]) == 0
    printed = capsys.readouterr().out
    assert "multimodal, sequences: 3 of mode 0 (text), 1 of mode 1; only text can be trained on" in printed


def test_get_reads_parts_and_refuses_what_is_outside(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_pair(tmp_path / "hand"))
    assert dataset.get(0, 1).tolist() == [2, 3]
    assert dataset.get(0, 1, 1).tolist() == [2]
    assert dataset.get_document(2, 1, 2).tolist() == [5, 6]
    assert dataset.tokens(2, 100).tolist() == [3, 4, 5, 6]
    for call in (
        lambda: dataset.get(4),
        lambda: dataset.get(-1),
        lambda: dataset.get(0, 0, 4),
        lambda: dataset.get(0, 4),
        lambda: dataset.get(0, -1),
        lambda: dataset.get_document(3),
    ):
        with pytest.raises(IndexError, match="hand"):
            call()


def test_tokens_cannot_be_changed_through_the_reader(tmp_path: Path) -> None:
    dataset = IndexedDataset(write_pair(tmp_path / "hand"))
    with pytest.raises(ValueError, match="read-only"):
        dataset.get(0)[0] = 7


@pytest.mark.parametrize(
    ("index", "tokens", "message"),
    [
        (b"NOTANIDX!" + IDX[9:], BIN, r"x\.idx starts with b'NOTANIDX!': required b'MMIDIDX"),
        (b"", BIN, r"x\.idx starts with b''"),
        (IDX[:20], BIN, r"x\.idx has 20 bytes: required at least 34"),
        (IDX[:9] + struct.pack("<Q", 2) + IDX[17:], BIN, r"x\.idx has version 2: required 1"),
        (IDX[:17] + b"\x09" + IDX[18:], BIN, r"x\.idx has token type code 9: required 1 to 8"),
        (IDX[:17] + b"\x00" + IDX[18:], BIN, r"x\.idx has token type code 0"),
        (IDX[:-1], BIN, r"x\.idx has 113 bytes: required 114 for its 4 sequences and 4 document indices"),
        (IDX + b"\x00", BIN, r"x\.idx has 115 bytes: required 114 .*, or 118 with the mode of each sequence"),
        (IDX[:26] + struct.pack("<Q", 0) + IDX[34:], BIN, r"x\.idx has no document indices"),
        (
            HEADER + struct.pack("<4i", 3, -1, 3, 1) + POINTERS + DOCUMENTS,
            BIN,
            r"x\.idx: sequence 1 has -1 tokens: required at least 0",
        ),
        (
            HEADER + LENGTHS + struct.pack("<4q", 0, 6, 8, 10) + DOCUMENTS,
            BIN,
            r"x\.idx: sequence 2 starts at byte 8: required 6",
        ),
        (
            HEADER + LENGTHS + struct.pack("<4q", 2, 6, 6, 10) + DOCUMENTS,
            BIN,
            r"x\.idx: sequence 0 starts at byte 2: required 0",
        ),
        (
            HEADER + LENGTHS + POINTERS + struct.pack("<4q", 1, 1, 2, 4),
            BIN,
            r"x\.idx: the first document starts at sequence 1: required 0",
        ),
        (
            HEADER + LENGTHS + POINTERS + struct.pack("<4q", 0, 1, 2, 3),
            BIN,
            r"x\.idx: the documents end at sequence 3: required 4",
        ),
        (
            HEADER + LENGTHS + POINTERS + struct.pack("<4q", 0, 2, 1, 4),
            BIN,
            r"x\.idx: document index 2 is 1: required at least 2",
        ),
        (IDX, BIN[:-2], r"x\.bin has 10 bytes, but .*x\.idx describes 12"),
        (IDX, BIN + b"\x00\x00", r"x\.bin has 14 bytes, but .*x\.idx describes 12"),
    ],
)
def test_damaged_pairs_are_refused(tmp_path: Path, index: bytes, tokens: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IndexedDataset(write_pair(tmp_path / "x", index, tokens))


@pytest.mark.parametrize("missing", ["bin", "idx"])
def test_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    write_pair(tmp_path / "x")
    (tmp_path / f"x.{missing}").unlink()
    with pytest.raises(FileNotFoundError, match=rf"there is no file .*x\.{missing} .*without the extension"):
        IndexedDataset(tmp_path / "x")


def test_dataset_without_sequences(tmp_path: Path) -> None:
    with IndexedDatasetBuilder(tmp_path / "none", np.int32) as builder:
        builder.finalize()
    dataset = IndexedDataset(tmp_path / "none")
    assert (len(dataset), dataset.num_documents, dataset.num_tokens) == (0, 0, 0)
    assert dataset.document_offsets.tolist() == [0]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # every example overwrites the same pair, which is part of the test
@given(data=st.data(), dtype=st.sampled_from([dtype for dtype in DTYPES.values() if dtype.kind != "f"]))
def test_round_trip(tmp_path: Path, data: st.DataObject, dtype: np.dtype) -> None:
    limits = np.iinfo(dtype)
    token = st.integers(int(limits.min), int(limits.max))
    documents = data.draw(st.lists(st.lists(st.lists(token, max_size=5), max_size=3), max_size=6))
    with IndexedDatasetBuilder(tmp_path / "x", dtype) as builder:
        for document in documents:
            tokens = np.array([token for sequence in document for token in sequence], dtype=dtype)
            builder.add_document(tokens, [len(sequence) for sequence in document])
        builder.finalize()
    dataset = IndexedDataset(tmp_path / "x")
    sequences = [sequence for document in documents for sequence in document]
    assert dataset.dtype == dtype
    assert [dataset.get(number).tolist() for number in range(len(dataset))] == sequences
    assert [dataset.get_document(number).tolist() for number in range(dataset.num_documents)] == [
        [token for sequence in document for token in sequence] for document in documents
    ]


def test_append_is_the_same_as_adding(tmp_path: Path) -> None:
    write_pair(tmp_path / "part")
    with IndexedDatasetBuilder(tmp_path / "merged", np.uint16) as builder:
        builder.add_document([9])
        builder.append(tmp_path / "part")
        builder.append(tmp_path / "part")
        builder.finalize()
    merged = IndexedDataset(tmp_path / "merged")
    documents = [merged.get_document(document).tolist() for document in range(merged.num_documents)]
    assert documents == [[9], [1, 2, 3], [], [4, 5, 6], [1, 2, 3], [], [4, 5, 6]]
    assert merged.sizes.tolist() == [1, 3, 0, 2, 1, 3, 0, 2, 1]


def test_append_refuses_another_token_type(tmp_path: Path) -> None:
    write_pair(tmp_path / "part")
    with (
        IndexedDatasetBuilder(tmp_path / "merged", np.int32) as builder,
        pytest.raises(ValueError, match=r"part\.idx has token type uint16: required int32"),
    ):
        builder.append(tmp_path / "part")


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([70000], None, "tokens from 70000 to 70000: required 0 to 65535"),
        ([-1], None, "tokens from -1 to -1"),
        ([0.5], None, "tokens of type float64: required integers"),
        ([[1, 2]], None, "shape .1, 2.: required one dimension"),
        ([1, 2], [1], r"lengths \[1\]: required non-negative with sum 2"),
        ([1, 2], [3, -1], "required non-negative with sum 2"),
    ],
)
def test_builder_refuses(tmp_path: Path, tokens: list, lengths: list[int] | None, message: str) -> None:
    with (
        IndexedDatasetBuilder(tmp_path / "x", np.uint16) as builder,
        pytest.raises(ValueError, match=message),
    ):
        builder.add_document(np.array(tokens), lengths)


def test_builder_refuses_an_unknown_type(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="token type float16: required one of uint8, int8, int16"):
        IndexedDatasetBuilder(tmp_path / "x", np.float16)
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_the_old_pair(tmp_path: Path) -> None:
    write_pair(tmp_path / "x")
    with pytest.raises(KeyError), IndexedDatasetBuilder(tmp_path / "x", np.int32) as builder:
        builder.add_document([1])
        raise KeyError
    assert IndexedDataset(tmp_path / "x").num_tokens == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_nothing_has_the_final_name_before_finalize(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(tmp_path / "x", np.int32)
    builder.add_document([1])
    with pytest.raises(FileNotFoundError):
        IndexedDataset(tmp_path / "x")
    builder.finalize()
    assert IndexedDataset(tmp_path / "x").num_tokens == 1


def test_best_dtype_is_megatrons() -> None:
    assert best_dtype(65499) == np.uint16
    assert best_dtype(65500) == best_dtype(1 << 31) == np.int32
    with pytest.raises(ValueError, match=r"vocabulary of 2147483649 tokens: required at most 2\^31"):
        best_dtype((1 << 31) + 1)


def test_digest_follows_the_lengths(tmp_path: Path) -> None:
    for name, documents in (("a", [[1, 2], [3]]), ("b", [[7, 8], [9]]), ("c", [[1], [2, 3]])):
        with IndexedDatasetBuilder(tmp_path / name, np.int32) as builder:
            for document in documents:
                builder.add_document(document)
            builder.finalize()
    a, b, c = (IndexedDataset(tmp_path / name).digest for name in "abc")
    assert a == b != c
