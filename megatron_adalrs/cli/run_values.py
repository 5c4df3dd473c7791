"""Values that a command line takes from a run: of the run that it loads, and of the model it begins with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_adalrs.config.run import PROCESS_FIELDS, RUN_CONFIG
from megatron_adalrs.run_directory.identity import find_run_directory

FOLDERS = ("run_dir", "save", "tensorboard_dir")
STATE = "state.json"
Values = dict[str, Any]


def values_of_run(path: Path, flag: str, load_yaml: Callable[[Path], Values]) -> Values:
    """Return the configuration of the run that a run directory, folder of checkpoints or checkpoint is of.

    Args:
        path: Value of `--load` or `--finetune-from`.
        flag: The flag, for error messages.
        load_yaml: Reader of a config.yaml.

    Returns:
        The values without the fields that belong to one process; empty if no configuration is found.

    Raises:
        ValueError: A file of the run cannot be read.
    """
    try:
        run_dir = find_run_directory(path)
        if run_dir is not None and (run_dir / RUN_CONFIG).is_file():
            values = load_yaml(run_dir / RUN_CONFIG)
        elif (path / RUN_CONFIG).is_file():
            values = load_yaml(path / RUN_CONFIG)
        else:
            values = _values_of_checkpoint(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag}: {error}") from None
    return {name: value for name, value in values.items() if name not in PROCESS_FIELDS}


def values_to_continue(load: Path, run_dir: str | Path | None, load_yaml: Callable[[Path], Values]) -> Values:
    """Return the values that a process takes from the run that it loads.

    Args:
        load: Value of `--load`.
        run_dir: Run directory that was given. Without it, the run is continued in its own.
        load_yaml: Reader of a config.yaml.

    Returns:
        The values, without the folders of the loaded run if another run directory was given.

    Raises:
        ValueError: There is no run, a file of it cannot be read, or `load` contains only weights.
    """
    if (load / "weights").is_dir():
        raise ValueError(
            f"--load: {load} holds only weights and cannot be resumed: start a new run with --finetune-from "
            f"{load}"
        )
    values = values_of_run(load, "--load", load_yaml)
    if not values and run_dir is not None:  # the loaded run has been removed since it was continued here
        values = values_of_run(Path(run_dir), "--run-dir", load_yaml)
    if not values and not _has_checkpoint(load):
        raise ValueError(f"--load: there is no run and no checkpoint in {load}")
    owner = find_run_directory(load)
    if owner is not None and (run_dir is None or Path(run_dir).resolve() == owner.resolve()):
        return values | {"run_dir": owner}
    return {name: value for name, value in values.items() if name not in FOLDERS}


def _has_checkpoint(path: Path) -> bool:
    """Return whether a path is a checkpoint, or a folder of checkpoints."""
    folder = path.parent if path.name == "latest" else path
    return any(one for pattern in (STATE, "iter_*", "checkpoints/iter_*") for one in folder.glob(pattern))


def _values_of_checkpoint(path: Path) -> Values:
    """Return the configuration in the state of a checkpoint."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    config = state.get("config") if isinstance(state, dict) else None
    return config if isinstance(config, dict) else {}
