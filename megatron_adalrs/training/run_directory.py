"""The run directory of all ranks: opened, written and closed by the first rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_adalrs.checkpoint import Start, begin, plan_start
from megatron_adalrs.config import Config
from megatron_adalrs.config.run import RELATIVE_TO
from megatron_adalrs.distributed.collectives import on_first_rank
from megatron_adalrs.run_directory import RunDirectory, RunFolders


class SharedRunDirectory:
    """A run directory that the first rank has locked for all ranks. The constructor is collective.

    Args:
        config: Configuration whose `run` names the folders and the checkpoint to load.

    Raises:
        ValueError: On every rank, if a folder cannot be written, another process uses the run directory, it
            holds a run that is not resumed, or no checkpoint can be loaded.
    """

    folders: RunFolders
    start: Start

    def __init__(self, config: Config) -> None:
        self._opened: RunDirectory | None = None
        self.folders, self.start = on_first_rank(lambda: self._open(config))

    def begin(self, config: Config) -> list[Path]:
        """Write the identity and the configuration of a run that is ready to train. Collective.

        Returns:
            Checkpoints of an abandoned branch of the run, which have been set aside.

        Raises:
            ValueError: On every rank, if a folder contains files of another run or cannot be written.
        """
        return on_first_rank(lambda: self._begin(config))

    def withdraw(self) -> None:
        """Remove what has been written for a run that could not begin, and close."""
        if self._opened:
            self._opened.withdraw()

    def close(self) -> None:
        """Let other processes use the run directory."""
        if self._opened:
            self._opened.release()

    def _open(self, config: Config) -> tuple[RunFolders, Start]:
        folders = RunFolders.of(config.run)
        self._opened = RunDirectory(folders)
        try:
            return folders, plan_start(config.run, self._opened)
        except (ValueError, OSError):
            self._opened.withdraw()
            raise

    def _begin(self, config: Config) -> list[Path]:
        assert self._opened is not None, "only the first rank calls this"
        start, own = self.start, self.start.checkpoint if self.start.is_own else None
        self._opened.claim(start.identity, own)
        self._opened.write_config(stored_config(config, start.identity.parent))
        return begin(start, self.folders.save)


def stored_config(config: Config, parent: str | None) -> dict[str, Any]:
    """Return the values of a run's config.yaml: what was given, so that it can start another run.

    Args:
        parent: Checkpoint of another run that this one began from.
    """
    origin = {"load": parent} if parent else {}
    return config.to_flat() | origin | {RELATIVE_TO: os.getcwd()}
