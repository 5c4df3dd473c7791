"""What a run has on disk: seen while it lives, cheaply, and judged once it is dead, thoroughly."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Glance:
    """The folder of checkpoints at an instant."""

    draft: str | None = None
    """Name of the checkpoint that is being written."""
    newest: int = 0
    """Step of the newest published one; 0: there is none."""


def glance(folder: Path) -> Glance:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return Glance()
    drafts = [name for name in names if name.endswith(".incomplete") and name.startswith(".iter_")]
    steps = [int(name.removeprefix("iter_")) for name in names if name.startswith("iter_")]
    return Glance(max(drafts, default=None), max(steps, default=0))


@dataclass(frozen=True)
class Verdict:
    """What a death left behind."""

    newest: int
    """Step of the newest checkpoint whose every byte is as its manifest says; 0: there is none."""
    checkpoints: int
    interrupted: str | None
    """What was cut short: "writing", "publishing", "removing"; None: nothing of a save."""
    wrong: tuple[str, ...]


def judge(folder: Path, published: int) -> Verdict:
    """Read every byte of every checkpoint. `published`: the newest step that was seen published before the death."""
    from megatron_adalrs.checkpoint import find_damage
    from megatron_adalrs.checkpoint.load import checkpoints_in, step_of

    wrong, sound = [], []
    for checkpoint in checkpoints_in(folder) if folder.is_dir() else ():
        damage = find_damage(checkpoint, hashes=True)
        if damage:
            wrong.append(f"{checkpoint} was published damaged: {damage}")
        else:
            sound.append(step_of(checkpoint))
    newest = max(sound, default=0)
    if newest < published:
        wrong.append(f"{folder} had step {published} published, and now has none beyond {newest}")
    named = (folder / "latest").read_text().strip() if (folder / "latest").exists() else None
    if named and not (folder / named).is_dir():
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


@dataclass(frozen=True)
class Progress:
    """What a run's own record tells of its processes so far."""

    last_step: int = 0
    """That the last process had completed."""
    resumed_at: int | None = None
    """Step that the last process began with; 0 for one that started afresh."""
    processes: int = 0


def progress(run: Path) -> Progress:
    """Read `metrics.jsonl`; a line that was cut short by a kill is left out."""
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
    """Loss of every step that the run consists of."""
    from megatron_adalrs.metrics.run_log import read_run

    train = read_run(run).train
    return dict(zip(train.step[train.kept].tolist(), train.loss[train.kept].tolist(), strict=True))
