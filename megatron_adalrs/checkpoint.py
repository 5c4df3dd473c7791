"""The on-disk checkpoint: publish, find, verify, resume.

    SAVE/iter_0000400/            one complete checkpoint
        engine/                   DeepSpeed's own files, every rank's
        random_00000.json ...     random streams, one file a rank
        state.json                step, data position, controller, configuration
        manifest.json             written last: every file and its size; a folder without it is no checkpoint
    SAVE/latest                   name of the newest one

A checkpoint is written under a temporary name and renamed once it is complete, so that a crash at any instant leaves
the previous ones untouched.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_adalrs
from megatron_adalrs.config import Config
from megatron_adalrs.engine import Engine, deepspeed_version
from megatron_adalrs.parallel.collectives import on_every_rank, on_first_rank
from megatron_adalrs.parallel.topology import Grid
from megatron_adalrs.random_state import random_state, set_random_state

FORMAT = 1
ENGINE, STATE, MANIFEST, LATEST = "engine", "state.json", "manifest.json", "latest"
SHAPE_FREE = {"preset", "vocab_size", "seq_length", "attention_dropout", "hidden_dropout", "init_method_std"}

log = logging.getLogger(__name__)


def save_checkpoint(engine: Engine, grid: Grid, save: Path, step: int, state: dict[str, Any]) -> Path:
    """Publish a checkpoint under `save`. Collective.

    Args:
        state: plain JSON values; `load_checkpoint` hands them back.
    """
    name = f"iter_{step:07d}"
    target, draft = save / name, save / f".{name}.incomplete"
    on_first_rank(lambda: _begin(draft))
    engine.save(draft / ENGINE)
    on_every_rank(lambda: _write_json(draft / f"random_{grid.rank:05d}.json", random_state()))
    dist.barrier()
    on_first_rank(lambda: _publish(draft, target, save / LATEST, state | {"world_size": grid.world_size}))
    return target


def load_checkpoint(engine: Engine, grid: Grid, checkpoint: Path) -> None:
    """Load a checkpoint's tensors and random streams into an engine that has not stepped yet. Collective."""
    engine.load(checkpoint / ENGINE)
    set_random_state(on_every_rank(lambda: _read_json(checkpoint / f"random_{grid.rank:05d}.json")))


def find_checkpoint(load: Path) -> Path:
    """The checkpoint that `--load` means: `load` itself, or the newest complete one in it or in its `checkpoints`.

    Raises:
        ValueError: there is none; damaged ones are named.
    """
    if (load / STATE).exists() or (load / MANIFEST).exists():
        if damage := find_damage(load):
            raise ValueError(f"--load: {load} is damaged: {damage}")
        return load
    folders = [folder for folder in (load, load / "checkpoints") if folder.is_dir()]
    candidates = sorted((path for folder in folders for path in folder.glob("iter_*")), key=lambda path: path.name)
    damaged = []
    for candidate in reversed(candidates):
        damage = find_damage(candidate)
        if damage is None:
            for text in damaged:
                log.warning("passing over a damaged checkpoint: %s", text)
            return candidate
        damaged.append(f"{candidate}: {damage}")
    found = f"; damaged: {'; '.join(damaged)}" if damaged else ""
    raise ValueError(f"--load: no checkpoint in {load}: expected {load}/iter_NNNNNNN with its {MANIFEST}{found}")


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files by their presence and size; None if nothing is."""
    try:
        manifest = _read_json(checkpoint / MANIFEST)
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is missing or unreadable ({error})"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {MANIFEST} says {size}"
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given, plus `world_size`.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        return _read_json(checkpoint / STATE)
    except (OSError, ValueError) as error:
        raise ValueError(f"--load: cannot read {checkpoint / STATE}: {error}") from None


def require_fitting(checkpoint: Path, state: dict[str, Any], config: Config, grid: Grid) -> None:
    """Check that a checkpoint can be loaded into the model that `config` describes.

    Raises:
        ValueError: naming the field, the checkpoint's value and this run's.
    """
    saved = state["config"]
    for name, value in config.model.model_dump(mode="json").items():
        default = type(config.model).model_fields[name].default
        if name not in SHAPE_FREE and saved.get(name, default) != value:
            raise ValueError(f"--load: {checkpoint} has {name} {saved.get(name, default)!r}, this run has {value!r}")
    for name in ("zero_stage", "bf16", "fp16"):
        if saved.get(name, False) != getattr(config.training, name):
            raise ValueError(
                f"--load: {checkpoint} was written with {name} {saved.get(name)!r}, this run has "
                f"{getattr(config.training, name)!r}; use the same"
            )
    for name, value in config.parallel.model_dump(mode="json").items():
        default = type(config.parallel).model_fields[name].default
        if saved.get(name, default) != value:
            raise ValueError(
                f"--load: {checkpoint} was written with {name} {saved.get(name, default)!r}, this run has {value!r}; "
                "use the same"
            )
    if state["world_size"] != grid.world_size:
        raise ValueError(
            f"--load: {checkpoint} was written by {state['world_size']} ranks, this run has {grid.world_size}; "
            "launch as many"
        )


def require_identity(checkpoint: Path, state: dict[str, Any], identity: dict[str, Any]) -> None:
    """Check that a run has the vocabulary of a checkpoint and sees the data that it saw in the same order.

    Raises:
        ValueError: naming what differs.
    """
    saved = state["identity"]
    if saved["vocab_size"] != identity["vocab_size"]:
        raise ValueError(
            f"--load: {checkpoint} has vocab_size {saved['vocab_size']}, this run has {identity['vocab_size']}"
        )
    if saved["data_order"] != identity["data_order"]:
        raise ValueError(
            f"--load: {checkpoint} saw its data in order {saved['data_order']}, this run's is "
            f"{identity['data_order']}: "
            "data_path, split, seed and seq_length must be those of the checkpoint"
        )


def _begin(draft: Path) -> None:
    for leftover in draft.parent.glob(".iter_*.incomplete"):
        shutil.rmtree(leftover)
    draft.mkdir(parents=True)


def _publish(draft: Path, target: Path, latest: Path, state: dict[str, Any]) -> None:
    _write_json(draft / STATE, state)
    files = {str(path.relative_to(draft)): path.stat().st_size for path in sorted(draft.rglob("*")) if path.is_file()}
    versions = {
        "megatron_adalrs": megatron_adalrs.__version__,
        "torch": torch.__version__,
        "deepspeed": deepspeed_version(),
        "python": platform.python_version(),
    }
    _write_json(draft / MANIFEST, {"format": FORMAT, "versions": versions, "files": files})
    if target.exists():
        shutil.rmtree(target)
    os.replace(draft, target)
    temporary = latest.with_name(".latest.incomplete")
    temporary.write_text(target.name + "\n", encoding="utf-8")
    os.replace(temporary, latest)


def _write_json(path: Path, content: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
