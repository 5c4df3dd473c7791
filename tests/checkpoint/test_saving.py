"""Saving in the background, and saves that fail on one rank only."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_adalrs.checkpoint import (
    CheckpointFolder,
    PendingSave,
    find_checkpoint,
    find_damage,
    load_checkpoint,
    save_checkpoint,
)
from tests.helpers import runs
from tests.helpers.ranks import Ranks

CELLS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "zero1": {"zero_stage": 1},
    "zero2-bf16": {"zero_stage": 2, "bf16": True},
    "zero3": {"zero_stage": 3},
    "pipe": {"pipeline_model_parallel_size": 2, "zero_stage": 1, "num_layers": 2, "global_batch_size": 8},
}


def saved_while_training(values: dict[str, Any], folder: str) -> tuple[list[float], list[float], int]:
    """Return the losses after an asynchronous save, those after loading it, and the copied bytes."""
    config, mesh, engine = runs.start(values)

    def losses(engine: Any, steps: range) -> list[float]:
        return [engine.train_batch(runs.micro_batches(config, mesh, step)).loss for step in steps]

    losses(engine, range(3))
    saving = PendingSave(
        engine, mesh, CheckpointFolder(Path(folder)), 3, {"config": config.to_flat()}, in_background=True
    )
    went_on = losses(engine, range(3, 6))
    checkpoint = saving.publish()
    copied = engine.files.copied_bytes
    buffers = [buffer.data_ptr() for buffer in engine.files._buffers]
    PendingSave(
        engine, mesh, CheckpointFolder(Path(folder)), 6, {"config": config.to_flat()}, in_background=True
    ).publish()
    assert [buffer.data_ptr() for buffer in engine.files._buffers] == buffers
    _, _, again = runs.start(values)
    load_checkpoint(again, mesh, checkpoint)
    return went_on, losses(again, range(3, 6)), copied


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_async_save_holds_state_at_the_save(two_ranks: Ranks, tmp_path: Path, cell: str) -> None:
    ranks = two_ranks.run(saved_while_training, CELLS[cell], str(tmp_path))
    assert all(resumed == went_on for went_on, resumed, _ in ranks)
    written = sum(path.stat().st_size for path in (tmp_path / "iter_0000003").rglob("*.pt"))
    assert 0.5 * written < sum(copied for *_, copied in ranks) <= written
    assert find_damage(tmp_path / "iter_0000003", hashes=True) is None
    assert find_checkpoint(tmp_path).name == "iter_0000006"


def failed_on_the_second_rank(folder: str, in_background: bool) -> tuple[str, str]:
    """Return the error of a save that rank 1 cannot write, and the name of the next checkpoint."""
    config, mesh, engine = runs.start({"zero_stage": 1, "hidden_size": 64})
    places, state = CheckpointFolder(Path(folder)), {"config": config.to_flat()}
    engine.train_batch(runs.micro_batches(config, mesh, 0))
    sizes = {
        path.stat().st_size
        for path in save_checkpoint(engine, mesh, places, 0, state).rglob("*optim_states.pt")
    }
    assert min(sizes) > 80_000  # larger than everything else that the rank writes
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mesh.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        PendingSave(engine, mesh, places, 1, state, in_background).publish()
        told = "it was published"
    except ValueError as error:
        told = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return told, save_checkpoint(engine, mesh, places, 1, state).name


@pytest.mark.parametrize("in_background", [False, True], ids=["at once", "in the background"])
def test_save_that_fails_on_one_rank_fails_on_all(
    two_ranks: Ranks, tmp_path: Path, in_background: bool
) -> None:
    started = time.monotonic()
    for told, name in two_ranks.run(failed_on_the_second_rank, str(tmp_path), in_background):
        assert told.startswith("rank 1: cannot write to ") and "optim_states.pt" in told
        assert name == "iter_0000001"
    assert time.monotonic() - started < 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000000", "iter_0000001", "latest"]


def test_copy_shares_no_memory_with_original() -> None:
    from collections import OrderedDict, namedtuple

    from megatron_adalrs.engine.checkpoint_io import CheckpointFiles

    Pair = namedtuple("Pair", "first second")
    flat = torch.arange(10.0)
    weights = OrderedDict(a=flat[:4], b=flat[4:])
    weights._metadata = {"version": 1}
    state = {
        "module": weights,
        "pairs": [Pair(flat[2:3], {"x": [1, 2]})],
        "name": "n",
        "none": None,
        "half": flat.bfloat16(),
    }
    files = CheckpointFiles()
    files.begin(copied=True)
    copied = files._copy(state)
    flat.fill_(-1)
    state["pairs"][0].second["x"].append(3)
    assert copied["module"]["a"].tolist() == [0, 1, 2, 3] and copied["module"]["b"].tolist() == [
        4,
        5,
        6,
        7,
        8,
        9,
    ]
    assert copied["module"]._metadata == {"version": 1} and isinstance(copied["module"], OrderedDict)
    assert copied["pairs"][0].first.tolist() == [2] and copied["pairs"][0].second == {"x": [1, 2]}
    assert copied["half"].dtype == torch.bfloat16 and (copied["name"], copied["none"]) == ("n", None)
    assert copied["module"]["b"].untyped_storage().nbytes() == 6 * 4
    assert files.copied_bytes == 10 * 4 + 4 + 10 * 2


def test_writer_error_without_message_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_adalrs.engine.checkpoint_io import CheckpointFiles

    def fails(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "save", fails)
    files = CheckpointFiles()
    files.begin(copied=True)
    files.save({}, str(tmp_path / "weights.pt"))
    files.start(str)
    with pytest.raises(OSError, match=r"cannot write to .*weights.pt: MemoryError"):
        files.finish()
