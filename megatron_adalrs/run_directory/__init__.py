"""The directory of a run: its folders, its identity, and the lock that keeps a second job out.

    RUN_DIR/
        run.json          identity of the run; `save` and `tensorboard_dir` have one too
        lock              process that writes to the run at present
        config.yaml       configuration, which `--config` accepts
        metrics.jsonl     records of the run
        decisions.jsonl   journal of the search and of the loss guard
        checkpoints/      `save`, unless the flag names another folder
        tensorboard/      `tensorboard_dir`, unless the flag names another folder

`RunDirectory` opens it. Nothing here imports torch.
"""

from __future__ import annotations

from megatron_adalrs.run_directory.directory import RunDirectory
from megatron_adalrs.run_directory.folders import RunFolders, require_writable
from megatron_adalrs.run_directory.identity import RunIdentity, find_run_directory

__all__ = ["RunDirectory", "RunFolders", "RunIdentity", "find_run_directory", "require_writable"]
