"""Copies of named tensors in reused buffers, in host memory or on disk, restored in place."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_adalrs.snapshot import host_buffers


class TensorSnapshot:
    """Copy of a set of named tensors that can be restored in place.

    Buffers are in host memory (pinned if the tensor is on an accelerator) and are allocated once: a later
    capture reuses the buffer of a tensor of the same name, shape and dtype. Tensors with different names
    must not share storage.

    Args:
        directory: Directory for the buffers instead of host memory. Their files are deleted with the
            snapshot, or when the process ends.
    """

    def __init__(self, directory: str | None = None) -> None:
        self._directory = directory
        self._buffers: dict[Hashable, Tensor] = {}
        self._streams: dict[torch.device, Any] = {}
        self._copied: list[Any] = []

    @property
    def nbytes(self) -> int:
        """Size of the buffers in bytes."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def __contains__(self, name: Hashable) -> bool:
        return name in self._buffers

    @torch.no_grad()
    def capture(self, tensors: Mapping[Hashable, Tensor]) -> None:
        """Copy the tensors and replace the previous capture.

        Copies from an accelerator are asynchronous: call `finish` before writing to the tensors.

        Raises:
            OSError: If the directory has too little space for the buffers.
        """
        self.finish()
        self._provide_buffers(tensors)
        for device, names in _by_device(tensors).items():
            targets, sources = [self._buffers[name] for name in names], [tensors[name] for name in names]
            if device.type == "cpu":
                torch._foreach_copy_(targets, sources)
            else:
                self._begin_copies(device, targets, sources)

    def finish(self) -> None:
        """Make each accelerator's current stream wait for the copies of `capture`; the host does not wait."""
        for device, copied in self._copied:
            torch.get_device_module(device).current_stream(device).wait_event(copied)
        self._copied = []

    @torch.no_grad()
    def restore(self, tensors: Mapping[Hashable, Tensor]) -> None:
        """Copy the captured values back in place.

        A tensor that was not captured is state created since the capture, and is set to zero.

        Raises:
            RuntimeError: If a captured tensor is missing or has another shape or dtype; no tensor is
                changed.
        """
        for name, buffer in self._buffers.items():
            tensor = tensors.get(name)
            if tensor is None:
                raise RuntimeError(f"{name!r} was captured but is not among the tensors to restore")
            if tensor.shape != buffer.shape or tensor.dtype != buffer.dtype:
                raise RuntimeError(
                    f"{name!r} was captured as {buffer.dtype} {list(buffer.shape)} but is now {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
        self.finish()
        created_since = [tensor for name, tensor in tensors.items() if name not in self._buffers]
        if created_since:
            torch._foreach_zero_(created_since)
        if self._buffers:
            # Copies to an accelerator are ordered before later work on its stream, and PyTorch does not reuse
            # freed pinned memory before the copies from it have finished.
            targets = [tensors[name] for name in self._buffers]
            torch._foreach_copy_(targets, list(self._buffers.values()), non_blocking=True)

    def clear(self) -> None:
        """Discard the captured values and free the buffers."""
        self._buffers = {}

    def _begin_copies(self, device: torch.device, targets: list[Tensor], sources: list[Tensor]) -> None:
        module = torch.get_device_module(device)
        if device not in self._streams:
            self._streams[device] = module.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(module.current_stream(device))
        with module.stream(stream):
            torch._foreach_copy_(targets, sources, non_blocking=True)
            copied = module.Event()
            copied.record(stream)
        self._copied.append((device, copied))

    def _provide_buffers(self, tensors: Mapping[Hashable, Tensor]) -> None:
        fitting = {name: self._buffers[name] for name, tensor in tensors.items() if self._fits(name, tensor)}
        missing = {name: tensor for name, tensor in tensors.items() if name not in fitting}
        if self._directory is None:
            made = {name: host_buffers.in_memory(tensor) for name, tensor in missing.items()}
        else:
            made = host_buffers.in_file(self._directory, missing)
        self._buffers = {name: fitting[name] if name in fitting else made[name] for name in tensors}

    def _fits(self, name: Hashable, tensor: Tensor) -> bool:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            return False
        # `is_pinned` is as slow as copying a small tensor, so it is called only if the answer matters.
        return tensor.is_cpu or self._directory is not None or buffer.is_pinned()


def _by_device(tensors: Mapping[Hashable, Tensor]) -> dict[torch.device, list[Hashable]]:
    names: dict[torch.device, list[Hashable]] = {}
    for name, tensor in tensors.items():
        names.setdefault(tensor.device, []).append(name)
    return names
