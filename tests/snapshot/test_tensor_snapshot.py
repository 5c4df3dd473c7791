from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from megatron_adalrs.snapshot.host_buffers import in_file, require_disk_space
from megatron_adalrs.snapshot.tensor_snapshot import TensorSnapshot


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "weight": torch.nn.Parameter(torch.randn(5, 7)),
        "half": torch.randn(3, 4, dtype=torch.bfloat16),
        "step": torch.tensor(17.0),
        "count": torch.arange(6),
        "transposed": torch.randn(4, 6).t(),
        "slice": torch.randn(8, 8)[::2, 1:5],
        "empty": torch.empty(0),
    }


def copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def spoil(tensors: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(-1)


def assert_equal(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def test_restore_is_bit_exact_and_in_place() -> None:
    tensors = some_tensors()
    expected, addresses = copies(tensors), {name: tensor.data_ptr() for name, tensor in tensors.items()}
    snapshot = TensorSnapshot()
    snapshot.capture(tensors)
    for _ in range(2):
        spoil(tensors)
        snapshot.restore(tensors)
        assert_equal(tensors, expected)
    assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == addresses
    assert tensors["weight"].requires_grad


def test_disk_snapshot_is_exact_and_leaves_no_file(tmp_path: Path) -> None:
    tensors = some_tensors()
    expected = copies(tensors)
    snapshot = TensorSnapshot(str(tmp_path))
    snapshot.capture({name: tensors[name] for name in ("weight", "step")})
    snapshot.capture(tensors)
    spoil(tensors)
    snapshot.restore(tensors)
    assert_equal(tensors, expected)
    assert snapshot.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert not list(tmp_path.iterdir())
    assert open_files_in(tmp_path) > 0
    snapshot.clear()
    assert open_files_in(tmp_path) == 0


def open_files_in(folder: Path) -> int:
    """Return the number of mapped files in a folder, including unlinked ones, which still use space."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_error_names_a_directory_without_space(tmp_path: Path) -> None:
    too_large = {"weight": torch.empty(2**50, device="meta")}
    with pytest.raises(
        OSError, match=f"adalrs.snapshot_dir: {tmp_path} cannot store a snapshot of {2**52} bytes"
    ):
        in_file(str(tmp_path), too_large)
    with pytest.raises(OSError, match=r"adalrs\.snapshot_dir: .*No such file"):
        in_file(str(tmp_path / "none"), {"weight": torch.empty(1)})


def test_directory_is_checked_before_the_run(tmp_path: Path) -> None:
    require_disk_space(str(tmp_path), 1000, processes=2)
    with pytest.raises(ValueError, match=rf"snapshots need {10**18} bytes x 2 process\(es\) = {2 * 10**18}"):
        require_disk_space(str(tmp_path), 10**18, processes=2)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=f"adalrs.snapshot_dir: {file} is not a directory"):
        require_disk_space(str(file), 1000, processes=1)


def test_order_of_names_does_not_matter() -> None:
    tensors = some_tensors()
    expected = copies(tensors)
    snapshot = TensorSnapshot()
    snapshot.capture(tensors)
    spoil(tensors)
    snapshot.restore(dict(reversed(tensors.items())))
    assert_equal(tensors, expected)


def test_later_capture_replaces_the_earlier() -> None:
    tensors = some_tensors()
    snapshot = TensorSnapshot()
    snapshot.capture(tensors)
    spoil(tensors)
    snapshot.capture(tensors)
    expected = copies(tensors)
    with torch.no_grad():
        tensors["weight"].zero_()
    snapshot.restore(tensors)
    assert_equal(tensors, expected)


def test_memory_equals_the_tensors_and_is_freed() -> None:
    tensors = some_tensors()
    snapshot = TensorSnapshot()
    assert snapshot.nbytes == 0
    for _ in range(3):
        snapshot.capture(tensors)
        assert snapshot.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    del tensors["weight"]
    snapshot.capture(tensors)
    assert snapshot.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    snapshot.clear()
    assert snapshot.nbytes == 0


def test_tensor_of_a_new_shape_gets_a_new_buffer() -> None:
    snapshot = TensorSnapshot()
    snapshot.capture({"a": torch.zeros(3)})
    grown = {"a": torch.arange(5.0)}
    snapshot.capture(grown)
    spoil(grown)
    snapshot.restore(grown)
    assert torch.equal(grown["a"], torch.arange(5.0))


def test_state_created_since_the_capture_is_zeroed() -> None:
    tensors = some_tensors()
    snapshot = TensorSnapshot()
    snapshot.capture(tensors)
    created = torch.ones(4)
    snapshot.restore({**tensors, "moment": created})
    assert torch.equal(created, torch.zeros(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("count"), "'count' was captured but is not among"),
        (lambda tensors: tensors.update(count=torch.arange(1)), r"'count' was captured as .*\[6\].*\[1\]"),
        (lambda tensors: tensors.update(count=torch.zeros(6)), r"'count' was captured as torch.int64"),
    ],
)
def test_mismatched_tensor_is_rejected_by_name(
    change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    tensors = some_tensors()
    snapshot = TensorSnapshot()
    snapshot.capture(tensors)
    change(tensors)
    spoil(tensors)
    expected = copies(tensors)
    with pytest.raises(RuntimeError, match=message):
        snapshot.restore(tensors)
    assert_equal(tensors, expected)
