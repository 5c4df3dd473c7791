"""Buffers for the tensors of a snapshot, in host memory or in a file on a local disk."""

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
    """Return a host buffer of the tensor's shape and dtype, pinned if the tensor is on an accelerator."""
    return torch.empty_like(tensor, device="cpu", pin_memory=not tensor.is_cpu, requires_grad=False)


def in_file(directory: str, tensors: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
    """Return buffers of the tensors' shapes and dtypes, memory-mapped from one new file.

    The operating system can write the mapped pages to the file and evict them from memory. The file is
    unlinked, so its space is freed with the buffers, or when the process ends, including after a crash.

    Args:
        directory: Directory for the file.
        tensors: Tensors to make buffers for, by name.

    Raises:
        OSError: If the file cannot be created or the disk has too little space, which is reserved at once.
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
            f"adalrs.snapshot_dir: {directory} cannot store a snapshot of {size} bytes: {reason}"
        ) from error
    buffers = {}
    for start, (name, tensor) in zip(starts, tensors.items(), strict=True):
        if not tensor.nbytes:
            buffers[name] = in_memory(tensor)
            continue
        flat = torch.frombuffer(mapped, dtype=torch.uint8, offset=start, count=tensor.nbytes)
        buffers[name] = flat.view(tensor.dtype).view(tensor.shape)
    return buffers


def require_disk_space(directory: str, snapshot_bytes: int, processes: int) -> None:
    """Check that the snapshots of all processes on this host fit in a directory.

    Args:
        directory: Directory for the snapshots.
        snapshot_bytes: Size of all snapshots of one process in bytes.
        processes: Number of processes on this host.

    Raises:
        ValueError: If the directory does not exist, is not writable or has too little space.
    """
    if not os.path.isdir(directory):
        raise ValueError(
            f"adalrs.snapshot_dir: {directory} is not a directory; create it on a local disk of this host"
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ValueError(f"adalrs.snapshot_dir: cannot write to {directory}")
    free, needed = shutil.disk_usage(directory).free, snapshot_bytes * processes
    if needed > free:
        raise ValueError(
            f"adalrs.snapshot_dir: {directory} has {free} bytes free, but the snapshots need "
            f"{snapshot_bytes} bytes x {processes} process(es) = {needed}"
        )
