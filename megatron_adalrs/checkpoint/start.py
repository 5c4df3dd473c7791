"""How a process starts: a new run, the next part of a run, or a new run from a checkpoint of another one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_adalrs.checkpoint.latest import abandon_newer
from megatron_adalrs.checkpoint.load import find_checkpoint, is_checkpoint, read_state
from megatron_adalrs.checkpoint.manifest import STATE, WEIGHTS
from megatron_adalrs.checkpoint.retention import checkpoints_in
from megatron_adalrs.config import RunConfig
from megatron_adalrs.run_directory import RunDirectory, RunIdentity, find_run_directory
from megatron_adalrs.run_directory.identity import read_run_file


@dataclass(frozen=True)
class Start:
    """How a process starts."""

    identity: RunIdentity
    checkpoint: Path | None = None
    """Checkpoint to resume from; None at the first step."""
    state: dict[str, Any] | None = None
    """Contents of its `state.json`."""
    is_own: bool = False
    """Whether the checkpoint is one of this run, and not of the run that this one continues."""
    note: str | None = None
    """What the user should know about the choice of the checkpoint."""


def plan_start(run: RunConfig, directory: RunDirectory) -> Start:
    """Decide how a process starts from `--load`, `--auto-resume` and the contents of its run directory.

    | run directory | flags | start |
    |---|---|---|
    | new | none, or `--auto-resume` | a new run |
    | new | `--load X` | a new run that continues the run of X |
    | holds a run | none | refused |
    | holds a run | `--load X`, a checkpoint of this run | from X; newer checkpoints are set aside |
    | holds a run | `--load X`, of another run | refused |
    | holds a run with checkpoints | `--auto-resume`, with `--load` or without | from its latest checkpoint |
    | holds a run without checkpoints | `--auto-resume` | as a new one, again |

    With `--auto-resume`, a checkpoint of this run that `--load` names by itself is loaded once: when the job
    is requeued with the same flags, it goes on from its latest checkpoint.

    Raises:
        ValueError: The run directory holds a run that the flags do not resume, a folder holds files of
            another run, or a checkpoint cannot be loaded.
    """
    own = directory.identity
    saved = _folder_of_checkpoints(directory) if run.auto_resume else None
    if own is None:
        return _start_without_identity(run, directory, saved or run.load)
    goes_back = run.load is not None and _names_own_checkpoint(run.load, own)
    if saved and run.load and goes_back and run.load.name == own.rolled_back_to:
        note = f"--load {run.load} has been applied before; --auto-resume goes on from the latest checkpoint"
        return Start(own, *_load(saved, run), is_own=True, note=note)
    if saved and not goes_back:
        return Start(own, *_load(saved, run), is_own=True)
    if run.load is None:
        if run.auto_resume:
            return Start(own)
        directory.require_new()
        raise AssertionError("require_new refuses a directory with an identity")
    checkpoint, state = _load(run.load, run)
    if _run_of(state) == own.id:
        return _from_own(own, checkpoint, state, named=is_checkpoint(run.load))
    if not run.auto_resume:
        directory.require_new()
    return Start(own, checkpoint, state)


def begin(start: Start, save: Path) -> list[Path]:
    """Make the resumed checkpoint the latest one of its run, when the run is ready to train.

    Returns:
        Checkpoints that were saved after it and have been set aside.
    """
    if start.checkpoint is None or not start.is_own:
        return []
    return abandon_newer(save, start.checkpoint)


def _start_without_identity(run: RunConfig, directory: RunDirectory, load: Path | None) -> Start:
    """Return the start in a run directory without run.json, which is new or has lost it."""
    if load is None:
        directory.require_new()
        return Start(RunIdentity.new())
    checkpoint, state = _load(load, run)
    if identity := _lives_here(checkpoint, state, directory):
        return _from_own(identity, checkpoint, state, named=is_checkpoint(load))
    directory.require_new()
    return Start(RunIdentity.new(parent=checkpoint), checkpoint, state)


def _from_own(identity: RunIdentity, checkpoint: Path, state: dict[str, Any], named: bool) -> Start:
    """Return the start of a run from its own checkpoint.

    Args:
        named: Whether `--load` names this checkpoint rather than a folder.
    """
    identity = identity.at_checkpoint(checkpoint.name) if named else identity
    return Start(identity, checkpoint, state, is_own=True)


def _load(path: Path, run: RunConfig) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint that a path names, and its state.

    Raises:
        ValueError: It cannot be loaded, or contains only weights.
    """
    found = find_checkpoint(path, run.strict_load, run.verify_checkpoint)
    if (found / WEIGHTS).is_dir():
        raise ValueError(
            f"--load: {found} holds only weights and cannot be resumed: start a new run with "
            f"--finetune-from {path}"
        )
    return found, read_state(found)


def _lives_here(checkpoint: Path, state: dict[str, Any], directory: RunDirectory) -> RunIdentity | None:
    """Return the identity of a checkpoint in the folder that this run saves to; None if it is elsewhere.

    This restores the identity of a run directory without run.json.
    """
    here = directory.folders.save.resolve()
    if here not in checkpoint.resolve().parents or "run" not in state:
        return None
    known = read_run_file(directory.folders.save)
    if known and known["id"] != _run_of(state):
        return None
    try:
        return RunIdentity.from_json(state["run"])
    except (ValueError, AttributeError) as error:
        raise ValueError(f"--load: {checkpoint / STATE}: run is not valid ({error})") from None


def _run_of(state: dict[str, Any]) -> str | None:
    """Return the id of the run that wrote a checkpoint; None if it is not known."""
    run = state.get("run")
    return run.get("id") if isinstance(run, dict) else None


def _names_own_checkpoint(load: Path, own: RunIdentity) -> bool:
    """Return whether a path names one checkpoint of a run, which may have been removed meanwhile."""
    if not load.name.startswith("iter_"):
        return False
    run_dir = find_run_directory(load)
    return run_dir is not None and (read_run_file(run_dir) or {}).get("id") == own.id


def _folder_of_checkpoints(directory: RunDirectory) -> Path | None:
    """Return the folder of the run's checkpoints: `save`, or where the run saved before."""
    save = directory.folders.save
    recorded = (read_run_file(directory.folders.run_dir) or {}).get("save", "checkpoints")
    places = [save, directory.folders.run_dir / recorded]
    return next((place for place in places if checkpoints_in(place)), None)
