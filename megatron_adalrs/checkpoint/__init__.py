"""On-disk checkpoints: save, find, verify, resume and remove them.

    SAVE/iter_0000400/            one complete checkpoint
        engine/                   DeepSpeed's files of every rank
        random_00000.json ...     states of the random number generators, one file per rank
        state.json                step, data position, controller, loss guard, configuration
        manifest.json             size and hash of every file; written last
    SAVE/latest                   name of the newest checkpoint
    SAVE/abandoned_0001/          checkpoints that a rollback has set aside

A checkpoint is written under a temporary name, synced to disk and renamed once it is complete, so that a
crash at any time leaves the previous checkpoints untouched. A folder without a manifest is not a checkpoint.
"""

from __future__ import annotations

from megatron_adalrs.checkpoint.compatibility import changes_since, require_compatible, require_same_data
from megatron_adalrs.checkpoint.disk_space import estimate_checkpoint_bytes, require_space
from megatron_adalrs.checkpoint.finetune import find_initial_weights, open_initial_weights
from megatron_adalrs.checkpoint.load import find_checkpoint, read_state, restore_entry
from megatron_adalrs.checkpoint.manifest import find_damage
from megatron_adalrs.checkpoint.open_model import OpenedModel, locate_model, open_model
from megatron_adalrs.checkpoint.resume import describe_resume, load_checkpoint, resume
from megatron_adalrs.checkpoint.retention import CheckpointFolder
from megatron_adalrs.checkpoint.save import PendingSave, save_checkpoint
from megatron_adalrs.checkpoint.start import Start, begin, plan_start
from megatron_adalrs.checkpoint.weights_only import write_weights_only

__all__ = [
    "CheckpointFolder",
    "OpenedModel",
    "PendingSave",
    "Start",
    "begin",
    "changes_since",
    "describe_resume",
    "estimate_checkpoint_bytes",
    "find_checkpoint",
    "find_damage",
    "find_initial_weights",
    "load_checkpoint",
    "locate_model",
    "open_initial_weights",
    "open_model",
    "plan_start",
    "read_state",
    "require_compatible",
    "require_same_data",
    "require_space",
    "restore_entry",
    "resume",
    "save_checkpoint",
    "write_weights_only",
]
