"""Named tensors copied out to reused buffers in host memory, and copied back in place."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

import torch
from torch import Tensor


class TensorSnapshot:
    """A copy of a set of named tensors that can be written back into them.

    Buffers live in host memory (pinned where the tensor lives on an accelerator) and are allocated once: a
    later capture of a tensor of the same name, shape and dtype goes into the same buffer.
    Distinct names must not share storage.
    """

    def __init__(self) -> None:
        self._buffers: dict[Hashable, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def __contains__(self, name: Hashable) -> bool:
        return name in self._buffers

    @torch.no_grad()
    def capture(self, tensors: Mapping[Hashable, Tensor]) -> None:
        """Copy every tensor out, in place of what was captured before."""
        self._buffers = {name: self._buffer_for(name, tensor) for name, tensor in tensors.items()}
        _copy(list(self._buffers.values()), list(tensors.values()))

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
        born_since = [tensor for name, tensor in tensors.items() if name not in self._buffers]
        if born_since:
            torch._foreach_zero_(born_since)
        _copy([tensors[name] for name in self._buffers], list(self._buffers.values()))

    def clear(self) -> None:
        """Free the buffers and forget what was captured."""
        self._buffers = {}

    def _buffer_for(self, name: Hashable, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        fits = buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype
        # Asking whether memory is pinned takes as long as copying a small tensor: only where it matters.
        if fits and (tensor.is_cpu or buffer.is_pinned()):
            return buffer
        return torch.empty_like(tensor, device="cpu", pin_memory=not tensor.is_cpu, requires_grad=False)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its target, with transfers to and from accelerators overlapping each other."""
    if not targets:
        return
    torch._foreach_copy_(targets, sources, non_blocking=True)
    for device in _accelerators(targets + sources):
        torch.get_device_module(device).synchronize(device)


def _accelerators(tensors: Iterable[Tensor]) -> set[torch.device]:
    return {tensor.device for tensor in tensors if not tensor.is_cpu}
