"""Named tensors copied out to reused buffers in host memory or on disk, and copied back in place."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_adalrs.snapshot import host_buffers


class TensorSnapshot:
    """A copy of a set of named tensors that can be written back into them.

    Buffers live in host memory (pinned where the tensor lives on an accelerator) and are allocated once: a
    later capture of a tensor of the same name, shape and dtype goes into the same buffer.
    Distinct names must not share storage.

    Args:
        directory: keep them in files there instead, which are gone with the snapshot or the process.
    """

    def __init__(self, directory: str | None = None) -> None:
        self._directory = directory
        self._buffers: dict[Hashable, Tensor] = {}
        self._streams: dict[torch.device, Any] = {}
        self._copied: list[Any] = []

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def __contains__(self, name: Hashable) -> bool:
        return name in self._buffers

    @torch.no_grad()
    def capture(self, tensors: Mapping[Hashable, Tensor]) -> None:
        """Copy every tensor out, in place of what was captured before.

        Copies from an accelerator are only begun: whoever writes to the tensors calls `finish` first.

        Raises:
            OSError: the directory has no room for the buffers.
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
        """Have what follows on an accelerator wait for copies that `capture` began; the host does not
        wait."""
        for device, copied in self._copied:
            torch.get_device_module(device).current_stream(device).wait_event(copied)
        self._copied = []

    @torch.no_grad()
    def restore(self, tensors: Mapping[Hashable, Tensor]) -> None:
        """Copy back in place. A tensor that was not captured is set to zero: it is state born since then.

        Raises:
            RuntimeError: a captured tensor is missing or has another shape or dtype; nothing is written.
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
        born_since = [tensor for name, tensor in tensors.items() if name not in self._buffers]
        if born_since:
            torch._foreach_zero_(born_since)
        if self._buffers:
            # Copies to an accelerator are in order with the work that follows on its stream, and torch keeps
            # pinned memory that is freed until the copies from it are through.
            targets = [tensors[name] for name in self._buffers]
            torch._foreach_copy_(targets, list(self._buffers.values()), non_blocking=True)

    def clear(self) -> None:
        """Free the buffers and forget what was captured."""
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
        # Asking whether memory is pinned takes as long as copying a small tensor: only where it matters.
        return tensor.is_cpu or self._directory is not None or buffer.is_pinned()


def _by_device(tensors: Mapping[Hashable, Tensor]) -> dict[torch.device, list[Hashable]]:
    names: dict[torch.device, list[Hashable]] = {}
    for name, tensor in tensors.items():
        names.setdefault(tensor.device, []).append(name)
    return names
