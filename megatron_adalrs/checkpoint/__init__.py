"""The on-disk checkpoint: publish, find, verify, resume, remove.

    SAVE/iter_0000400/            one complete checkpoint
        engine/                   DeepSpeed's own files, every rank's
        random_00000.json ...     random streams, one file a rank
        state.json                step, data position, controller, memory of losses, configuration
        manifest.json             written last: every file, its size and hash; a folder without it is no
        checkpoint
    SAVE/latest                   name of the newest one

A checkpoint is written under a temporary name, brought to disk, and renamed once it is complete, so that a
crash at any instant leaves the previous ones untouched.

save.py      writing and publishing one, removing old ones
manifest.py  what a checkpoint consists of, and what is wrong with it
load.py      finding the one to resume from, and loading it
regrid.py    resuming, on the mesh that wrote it or another
opened.py    a model in any form that one is kept in, Hugging Face's too
tokenizer_files.py  the tokenizer that goes with it
weights.py   a new run's initial weights from one
weights_only.py  a checkpoint of nothing but them
fitting.py   whether it is of this run's model, mesh and data
"""

from __future__ import annotations

from megatron_adalrs.checkpoint.compatibility import require_compatible, require_same_data
from megatron_adalrs.checkpoint.load import (
    checkpoint_to_resume,
    find_checkpoint,
    load_checkpoint,
    read_state,
    restore_entry,
)
from megatron_adalrs.checkpoint.manifest import find_damage
from megatron_adalrs.checkpoint.open_model import OpenedModel, locate_model, open_model
from megatron_adalrs.checkpoint.resume import describe_resume, resume
from megatron_adalrs.checkpoint.save import CheckpointFolder, PendingSave, save_checkpoint
from megatron_adalrs.checkpoint.weights import find_initial_weights, open_initial_weights
from megatron_adalrs.checkpoint.weights_only import write_weights_only

__all__ = [
    "CheckpointFolder",
    "OpenedModel",
    "PendingSave",
    "checkpoint_to_resume",
    "describe_resume",
    "find_checkpoint",
    "find_damage",
    "find_initial_weights",
    "load_checkpoint",
    "locate_model",
    "open_initial_weights",
    "open_model",
    "read_state",
    "require_compatible",
    "require_same_data",
    "restore_entry",
    "resume",
    "save_checkpoint",
    "write_weights_only",
]
