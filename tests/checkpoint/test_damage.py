"""Damaged, forged and foreign checkpoints are refused with one sentence before a pickle is opened."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_adalrs.checkpoint import find_checkpoint, find_damage, read_state, restore_entry
from megatron_adalrs.checkpoint.manifest import sha256, write_manifest
from megatron_adalrs.checkpoint.resume import _read_rng_state
from megatron_adalrs.checkpoint.retention import checkpoints_in
from megatron_adalrs.checkpoint.save import _begin, _publish
from megatron_adalrs.checkpoint.train_state import TrainState
from megatron_adalrs.snapshot.rng_state import RngState, seed_everything
from tests.checkpoint.test_checkpoint import fake, files_of, rewrite_manifest
from tests.helpers.mutations import bytes_like, mutated

FUZZING = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ENTRY = {"size": 1, "sha256": "0" * 64}


def with_file(name: Any, entry: Any = ENTRY) -> Callable[[Path], None]:
    return rewrite_manifest(lambda manifest: manifest["files"].update({name: entry}))


def with_text(text: str) -> Callable[[Path], Any]:
    return lambda checkpoint: (checkpoint / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_text("[]"), "it has no format"),
        (with_text("[" * 200_000), "(is nested too deeply)"),
        (with_text("1" * 10_000), "Exceeds the limit"),
        (with_text('{"format": 3, "format": 3}'), "'format' is given twice"),
        (rewrite_manifest(lambda m: m.update(format=True)), "it has no format"),
        (rewrite_manifest(lambda m: m.update(format="3")), "it has no format"),
        (rewrite_manifest(lambda m: m.update(step="1")), "step must be a whole number, at least 0"),
        (rewrite_manifest(lambda m: m.update(step=-1)), "step must be a whole number, at least 0"),
        (rewrite_manifest(lambda m: m.update(step=10**30)), "is of step 1000000000000000000000000000000"),
        (rewrite_manifest(lambda m: m.update(versions=[])), "versions must be strings by name"),
        (rewrite_manifest(lambda m: m.update(versions={"torch": 2})), "versions must be strings by name"),
        (rewrite_manifest(lambda m: m.update(files=[])), "files must hold state.json"),
        (rewrite_manifest(lambda m: m.update(files={})), "files must hold state.json"),
        (with_file("../state.json"), "'../state.json' is not a path within the checkpoint"),
        (with_file("engine/../../x"), "'engine/../../x' is not a path within the checkpoint"),
        (with_file("/etc/passwd"), "'/etc/passwd' is not a path within the checkpoint"),
        (with_file("engine//weights.pt"), "'engine//weights.pt' is not a path within the checkpoint"),
        (with_file("./state.json"), "'./state.json' is not a path within the checkpoint"),
        (with_file(""), "'' is not a path within the checkpoint"),
        (with_file("a\0b"), r"'a\x00b' is not a path within the checkpoint"),
        (with_file("a" * 5000), "a file cannot be read ([Errno 36] File name too long"),
        (with_file("\ud800"), r"'\ud800' is not a path within the checkpoint"),
        (with_file("x", 3), "x has no size"),
        (with_file("x", {"size": -1, "sha256": "0" * 64}), "x has no size"),
        (with_file("x", {"size": 1.0, "sha256": "0" * 64}), "x has no size"),
        (with_file("x", {"size": 1, "sha256": 7}), "x has no SHA-256"),
        (with_file("x", {"size": 1, "sha256": "../x"}), "x has no SHA-256"),
        (with_file("state.json", {"size": 10**30, "sha256": "0" * 64}), f"manifest.json says {10**30}"),
    ],
)
def test_forged_manifest_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    checkpoint = fake(tmp_path, 1)
    damage(checkpoint)
    told = str(find_damage(checkpoint, hashes=True))
    assert message in told and "\n" not in told
    with pytest.raises(ValueError, match="is damaged: "):
        find_checkpoint(checkpoint)


@FUZZING
@given(data=st.data())
def test_damaged_metadata_is_always_detected(tmp_path: Path, data: st.DataObject) -> None:
    checkpoint = tmp_path / "iter_0000001"
    if not checkpoint.exists():
        fake(tmp_path, 1)
    name = data.draw(st.sampled_from(["manifest.json", "state.json", "random_00000.json"]))
    whole = (checkpoint / name).read_bytes()
    damaged = data.draw(mutated(whole))
    try:
        (checkpoint / name).write_bytes(damaged)
        told = find_damage(checkpoint)
        if name != "manifest.json" and damaged != whole:
            assert told is not None
        if told is None and name == "manifest.json":
            theirs, ours = json.loads(damaged), json.loads(whole)
            # A manifest is not hashed itself: a flip in versions, or the hash of a file that is only sized,
            # stays.
            assert theirs["files"].keys() == ours["files"].keys() and theirs["step"] == ours["step"]
    finally:
        (checkpoint / name).write_bytes(whole)


def states() -> dict[str, Any]:
    return {
        "progress": {"step": 3, "consumed_samples": 12, "total_steps": 3, "skipped_samples": [[4, 8]]},
        "controller": {"mode": "fixed", "step": 3},
        "loss_guard": {},
        "identity": {"vocab_size": 50},
        "config": {"seed": 1},
        "world_size": 2,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world_size": "2"}, "world_size must be int, not '2'"),
        ({"config": None}, "config must be dict, not None"),
        ({"controller": []}, r"controller must be dict, not \[\]"),
        ({"progress": 7}, "progress must be dict, not 7"),
        ({"progress": {"step": "3"}}, "progress.step is '3', which is not a valid int"),
        ({"progress": {"step": -3}}, "progress.step is -3"),
        ({"progress": {"step": True}}, "progress.step is True"),
        ({"progress": {"snapshot_seconds": float("nan")}}, "progress.snapshot_seconds is nan"),
        ({"progress": {"skipped_samples": [[8, 4]]}}, r"progress.skipped_samples is \[\[8, 4\]\]"),
        ({"progress": {"skipped_samples": [3]}}, r"progress.skipped_samples is \[3\]"),
        ({"progress": {"leaps": 1}}, "progress has 'leaps', which is not a field of this version"),
    ],
)
def test_state_entry_of_wrong_type_is_refused(tmp_path: Path, changes: Any, message: str) -> None:
    file = tmp_path / "state.json"
    file.write_text(json.dumps(states()))
    assert read_state(tmp_path) == states()
    file.write_text(json.dumps(states() | changes))
    with pytest.raises(ValueError, match=f"--load: cannot read {file}: {message}"):
        read_state(tmp_path)


@pytest.mark.parametrize("entry", [{}, {"controller": None}, {"controller": {"mode": "fixed"}}])
def test_entry_that_cannot_be_loaded_is_named(tmp_path: Path, entry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"--load: .*state.json: controller is not valid \("):
        restore_entry(tmp_path, entry, "controller", lambda saved: saved["step"])


@FUZZING
@given(data=st.data())
def test_a_damaged_state_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "state.json").write_bytes(data.draw(mutated(json.dumps(states()).encode())))
    try:
        state = read_state(tmp_path)
    except ValueError as error:
        assert str(error).startswith(f"--load: cannot read {tmp_path}/state.json: ")
        return
    TrainState(**state.get("progress", {}))


@FUZZING
@given(data=st.data())
def test_damaged_random_state_changes_no_generator(tmp_path: Path, data: st.DataObject) -> None:
    seed_everything(1, 0)
    before = json.dumps(RngState.capture().to_json())
    saved = json.loads(before)
    name = data.draw(st.sampled_from(["python", "numpy", "torch"]))
    place = data.draw(st.sampled_from([None, 0, 1, 2, "inner"]))
    strange = data.draw(
        st.sampled_from([None, -1, 10**30, 2**31, "x", [], {}, 1.5, float("nan"), [1] * 700, "00" * 9])
    )
    if place is None or name == "torch":
        saved[name] = strange
    elif place == "inner":
        saved[name][1][data.draw(st.integers(0, len(saved[name][1]) - 1))] = strange
    else:
        saved[name][place] = strange
    (tmp_path / "random_00000.json").write_text(json.dumps(saved))
    try:
        _read_rng_state(tmp_path / "random_00000.json")
    except ValueError as error:
        assert f"random_00000.json: {name} is not the state of a random generator" in str(error)
    assert json.dumps(RngState.capture().to_json()) == before


@FUZZING
@given(
    content=bytes_like(
        json.dumps({"python": [3, [1, 2], None], "numpy": ["MT19937", [1], 0, 0, 0.0], "torch": "0"})
    )
)
def test_random_state_must_be_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "random_00000.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"--load: cannot read .*random_00000.json: "):
        _read_rng_state(tmp_path / "random_00000.json")


def test_other_versions_are_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = fake(tmp_path, 1)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path) == checkpoint
        assert not caplog.records
        rewrite_manifest(lambda manifest: manifest["versions"].update(torch="1.0", python="2.7"))(checkpoint)
        assert find_checkpoint(tmp_path) == checkpoint
    assert f"{checkpoint} was written by torch 1.0 (here 2" in caplog.text
    assert "python" not in caplog.text and "deepspeed" not in caplog.text


@pytest.mark.parametrize("renames", range(5))
def test_kill_during_replacement_loses_no_checkpoint(tmp_path: Path, renames: int) -> None:
    fake(tmp_path, 7, of="old!!")
    draft = tmp_path / ".iter_0000007.incomplete"
    os.replace(fake(tmp_path / "elsewhere", 7, of="newer"), draft)
    (tmp_path / "elsewhere").rmdir()
    (draft / "manifest.json").unlink()
    child = os.fork()
    if child == 0:
        _die_after(renames)
        hashes = {name: sha256(draft / name) for name in files_of(draft)}
        _publish(draft, tmp_path / "iter_0000007", hashes, {"step": 7})
        os._exit(0)
    os.waitpid(child, 0)
    (found,) = checkpoints_in(tmp_path)
    assert find_damage(found, hashes=True) is None
    assert find_checkpoint(tmp_path) == found
    of = json.loads((found / "state.json").read_text())["of"]
    assert of == ("old!!" if renames < 3 else "newer")
    _begin(tmp_path, tmp_path / ".iter_0000008.incomplete")
    (found,) = checkpoints_in(tmp_path)
    assert found.name == "iter_0000007" and json.loads((found / "state.json").read_text())["of"] == of
    assert not list(tmp_path.glob(".*.replaced"))


def _die_after(renames: int) -> None:
    """End this process instead of the next rename after `renames` of them."""
    left, rename = [renames], os.replace

    def replace(*paths: Any) -> None:
        if not left[0]:
            os._exit(9)
        left[0] -= 1
        rename(*paths)

    os.replace = replace


def test_manifest_must_match_step_of_folder(tmp_path: Path) -> None:
    checkpoint = fake(tmp_path, 3)
    renamed = checkpoint.rename(tmp_path / "iter_0000009")
    assert find_damage(renamed) == "manifest.json is of step 3"
    kept = renamed.rename(tmp_path / "best")
    assert find_checkpoint(kept) == kept
    write_manifest(
        kept,
        {name: sha256(kept / name) for name in files_of(kept) if name != "manifest.json"},
        {"step": random.randrange(99)},
    )
    assert find_damage(kept) is None
