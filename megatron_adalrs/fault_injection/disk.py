"""Files of a run: a quick look at its checkpoints while it runs, and a complete check after a kill."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FolderState:
    """State of a folder of checkpoints."""

    draft: str | None = None
    """Name of the checkpoint that is being written, if any."""
    newest: int = 0
    """Step of the newest published checkpoint; 0 if there is none."""


def read_folder(folder: Path) -> FolderState:
    """List a folder of checkpoints."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return FolderState()
    drafts = [name for name in names if name.endswith(".incomplete") and name.startswith(".iter_")]
    steps = [int(name.removeprefix("iter_")) for name in names if name.startswith("iter_")]
    return FolderState(max(drafts, default=None), max(steps, default=0))


@dataclass(frozen=True)
class Verdict:
    """Result of the check after a kill."""

    newest: int
    """Step of the newest checkpoint, up to `latest`, that matches its hashes; 0 if there is none."""
    checkpoints: int
    """Number of checkpoints that match their hashes."""
    interrupted: str | None
    """Phase of a save that was interrupted: "writing", "publishing" or "removing"; None if none was."""
    wrong: tuple[str, ...]
    """Failed checks."""


def check_checkpoints(folder: Path, published: int) -> Verdict:
    """Compare every checkpoint with its hashes.

    Args:
        folder: Folder of checkpoints.
        published: Step of the newest checkpoint that was seen before the kill.
    """
    from megatron_adalrs.checkpoint import find_damage
    from megatron_adalrs.checkpoint.manifest import step_of
    from megatron_adalrs.checkpoint.retention import checkpoints_in

    wrong, sound = [], []
    for checkpoint in checkpoints_in(folder) if folder.is_dir() else ():
        damage = find_damage(checkpoint, hashes=True)
        if damage:
            wrong.append(f"{checkpoint} was published damaged: {damage}")
        else:
            sound.append(step_of(checkpoint))
    named = (folder / "latest").read_text().strip() if (folder / "latest").exists() else None
    newest = max((step for step in sound if not named or step <= step_of(folder / named)), default=0)
    if newest < published:
        wrong.append(f"{folder} had step {published} published, and now has none beyond {newest}")
    # `latest` is written before a checkpoint gets its name.
    if named and not ((folder / named).is_dir() or (folder / f".{named}.incomplete/manifest.json").exists()):
        wrong.append(f"{folder}/latest names {named}, which is not there")
    return Verdict(newest, len(sound), _interrupted(folder, newest, named), tuple(wrong))


def _interrupted(folder: Path, newest: int, named: str | None) -> str | None:
    if any(folder.glob(".iter_*.removed")) or any(folder.glob(".iter_*.replaced")):
        return "removing"
    if newest and named != f"iter_{newest:07d}":
        return "publishing"
    if drafts := list(folder.glob(".iter_*.incomplete")):
        return "publishing" if any((draft / "manifest.json").exists() for draft in drafts) else "writing"
    return None


def lock_holder(run: Path) -> int | None:
    """Return the process id in the lock of a run directory, whose process may have been killed."""
    try:
        holder = json.loads((run / "lock").read_text())
    except (OSError, ValueError):
        return None
    return int(holder["pid"])


@dataclass(frozen=True)
class Progress:
    """Attempts of a run according to its metrics.jsonl."""

    last_step: int = 0
    """Last step that the last attempt completed."""
    resumed_at: int | None = None
    """Step at which the last attempt began; 0 if it did not resume."""
    processes: int = 0
    """Number of attempts."""


def progress(run: Path) -> Progress:
    """Read metrics.jsonl, skipping a line that a kill has truncated."""
    last_step, resumed_at, processes = 0, None, 0
    file = run / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("event") in ("start", "resume"):
            last_step = resumed_at = record["step"]
            processes += 1
        last_step = record["step"] if record["kind"] == "train" else last_step
    return Progress(last_step, resumed_at, processes)


def kept_losses(run: Path) -> dict[int, float]:
    """Return the losses of the steps that the run has kept, by step."""
    from megatron_adalrs.metrics.run_log import read_run

    train = read_run(run).train
    return dict(zip(train.step[train.kept].tolist(), train.loss[train.kept].tolist(), strict=True))
