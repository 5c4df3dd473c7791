"""Where a snapshot's tensors are kept: in host memory, or in a file on a local disk."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

_ALIGNMENT = 64


def in_memory(tensor: Tensor) -> Tensor:
    """A buffer like this tensor in host memory, pinned where the tensor lives on an accelerator."""
    return torch.empty_like(tensor, device="cpu", pin_memory=not tensor.is_cpu, requires_grad=False)


def in_file(directory: str, tensors: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
    """Buffers like these tensors, mapped from one new file in a directory; the system may take their memory
    away.

    The file has no name: its space comes back with the buffers, or when the process ends, however it ends.

    Raises:
        OSError: the file cannot be made, or the disk lacks the space, which is reserved at once.
    """
    starts, size = [], 0
    for tensor in tensors.values():
        starts.append(size)
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    if not size:
        return {name: in_memory(tensor) for name, tensor in tensors.items()}
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"adalrs.snapshot_dir: {directory} cannot take a snapshot of {size} bytes: {reason}"
        ) from error
    buffers = {}
    for start, (name, tensor) in zip(starts, tensors.items(), strict=True):
        if not tensor.nbytes:
            buffers[name] = in_memory(tensor)
            continue
        flat = torch.frombuffer(mapped, dtype=torch.uint8, offset=start, count=tensor.nbytes)
        buffers[name] = flat.view(tensor.dtype).view(tensor.shape)
    return buffers


def require_room(directory: str, snapshot_bytes: int, processes: int) -> None:
    """Whether the snapshots of all processes on this host fit in a directory.

    Args:
        snapshot_bytes: of one process, all its snapshots together.

    Raises:
        ValueError: it is no directory that can be written to, or has too little space; the arithmetic is
            shown.
    """
    if not os.path.isdir(directory):
        raise ValueError(
            f"adalrs.snapshot_dir: {directory} is not a directory; make it, on a disk of this host"
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ValueError(f"adalrs.snapshot_dir: cannot write to {directory}")
    free, needed = shutil.disk_usage(directory).free, snapshot_bytes * processes
    if needed > free:
        raise ValueError(
            f"adalrs.snapshot_dir: {directory} has {free} bytes free, and the snapshots take "
            f"{snapshot_bytes} bytes x {processes} process(es) = {needed}"
        )
