"""The run directory: its paths, whether it can be used, and the configuration stored in it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import yaml

from megatron_adalrs.config import Config
from megatron_adalrs.config.run import RUN_CONFIG


def with_run_dir(config: Config) -> Config:
    """Return the configuration with every path of the run filled in.

    The run directory is not created here but by `write_config`, when all checks have passed.

    Raises:
        ValueError: The directory cannot be written, or contains another run.
    """
    run = config.run
    run_dir = run.run_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    _require_writable(run_dir)
    if (run_dir / "metrics.jsonl").exists() and run.load is None and not run.auto_resume:
        raise ValueError(
            f"run_dir: {run_dir} already holds a run; choose another directory, or resume it with --load "
            f"{run_dir}"
        )
    paths = {
        "run_dir": run_dir,
        "save": run.save or run_dir / "checkpoints",
        "tensorboard_dir": run.tensorboard_dir or run_dir / "tensorboard",
    }
    return config.model_copy(update={"run": run.model_copy(update=paths)})


def run_dir_of(config: Config) -> Path:
    """Return the run directory of a configuration that `with_run_dir` returned."""
    assert config.run.run_dir is not None, "with_run_dir has not been called"
    return config.run.run_dir


def tensorboard_dir_of(config: Config) -> Path:
    """Return the folder of TensorBoard's event files of a configuration that `with_run_dir` returned."""
    assert config.run.tensorboard_dir is not None, "with_run_dir has not been called"
    return config.run.tensorboard_dir


def write_config(config: Config) -> None:
    """Create the run directory and write the effective configuration, which `--config` accepts."""
    run_dir = run_dir_of(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / RUN_CONFIG
    temporary = path.with_suffix(".yaml.incomplete")
    temporary.write_text(yaml.safe_dump(config.to_flat(), sort_keys=False), encoding="utf-8")
    os.replace(temporary, path)


def _require_writable(run_dir: Path) -> None:
    """Check that files can be created in a directory, and remove what did not exist before."""
    created = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK):
            raise PermissionError("permission denied")
        (run_dir / ".writable").touch()
        (run_dir / ".writable").unlink()
        for folder in created:
            with suppress(OSError):  # another run may have put its directory there meanwhile
                folder.rmdir()
    except OSError as error:
        raise ValueError(f"run_dir: cannot write to {run_dir}: {error.strerror or error}") from None
