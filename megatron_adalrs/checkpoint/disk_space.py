"""Disk space for checkpoints, checked before a run begins and before each checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_adalrs.checkpoint.retention import checkpoints_in
from megatron_adalrs.utils.format import quantity

REQUIRED_SPACE = 1.05
"""Free disk space required before a checkpoint is written, as a multiple of the size of the last one."""
NEARLY_FULL = 3
"""Number of checkpoints for which the disk must have room, or a run says that it is nearly full."""


def estimate_checkpoint_bytes(parameters: int, precision: str) -> int:
    """Return the approximate size of a checkpoint.

    It has the weights, and the optimizer's two moments and, in 16 bits, its master weights in fp32.

    Args:
        parameters: Number of parameters of the model.
        precision: "fp32", "bf16" or "fp16".
    """
    return parameters * (12 if precision == "fp32" else 14)


def require_space(save: Path, estimate: int) -> str | None:
    """Check that the disk has room for a checkpoint.

    Args:
        save: Folder of the checkpoints, which need not exist.
        estimate: Size of a checkpoint if there is none yet.

    Returns:
        A warning if there is room for few checkpoints only.

    Raises:
        ValueError: There is no room for one.
    """
    size = last_size(save) or estimate
    place = next(folder for folder in (save, *save.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < size:
        raise ValueError(
            f"save: the disk of {save} has {quantity(free, 'B')} free, and a checkpoint takes about "
            f"{quantity(size, 'B')}"
        )
    if free >= NEARLY_FULL * size:
        return None
    return (
        f"the disk of {save} is nearly full: {quantity(free, 'B')} free, and a checkpoint takes about "
        f"{quantity(size, 'B')}"
    )


def last_size(save: Path) -> int:
    """Return the size of the newest checkpoint in bytes; 0 if there is none."""
    found = checkpoints_in(save)
    return sum(path.stat().st_size for path in found[-1].rglob("*") if path.is_file()) if found else 0
