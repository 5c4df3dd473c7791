"""Target of scalars in Weights & Biases, online or offline according to its variable WANDB_MODE."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from megatron_adalrs.utils.format import first_line

_SECONDS_TO_START = 60
_ID = "wandb_id"


def require_wandb(project: str | None) -> None:
    """Raise ValueError if a project is given and the package wandb is not installed."""
    if project is not None and find_spec("wandb") is None:
        raise ValueError(
            f"wandb_project: {project}: needs the package wandb: pip install 'megatron-adalrs[wandb]'"
        )


class WandbRun:
    """A run of Weights & Biases, which is continued when training is resumed.

    Every failure is raised as an OSError by `add`, so that training continues without it. A failed start is
    not tried again.

    Args:
        project: Name of the project.
        name: Name of the run.
        run_dir: Folder of the run's id and, under wandb/, of the files of offline runs.
        config: Effective configuration.
    """

    def __init__(self, project: str, name: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        self.name = f"Weights & Biases' project {project}"
        self._project, self._run_name, self._run_dir, self._config = project, name, run_dir, dict(config)
        self._run: Any = None
        self._failure: str | None = None

    def begin(self) -> None:
        """Start or continue the run, which takes seconds. Call it once, on the first rank."""
        try:
            self._run = self._started()
        except Exception as error:  # errors of wandb and of the network
            self._failure = first_line(error)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Log the scalars of one step by tag, or raise OSError."""
        if self._failure is None:
            try:
                self._run.log({**values, "step": step})
                return
            except Exception as error:
                self._failure = first_line(error)
        raise OSError(self._failure)

    def drop_after(self, step: int) -> None:
        """Do nothing: points that were logged cannot be removed, and later ones have the same steps."""

    def close(self) -> None:
        """Finish the run, or raise OSError."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                raise OSError(first_line(error)) from error

    def _started(self) -> Any:
        import wandb

        file = self._run_dir / _ID
        if not file.exists():
            file.write_text(uuid4().hex[:8])
        run = wandb.init(
            project=self._project,
            name=self._run_name,
            id=file.read_text().strip(),
            resume="allow",
            dir=str(self._run_dir),
            config=self._config,
            settings=wandb.Settings(console="off", init_timeout=_SECONDS_TO_START),
        )
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        return run
