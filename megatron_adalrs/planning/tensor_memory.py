"""Bytes of the tensors that a process holds, and the most that it held: what `max_memory_allocated` is on
accelerators, counted for any device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Context in which every storage that an operation returns is counted for as long as it lives.

    Each storage counts once, at its full size, however many tensors view it: weights, gradients, optimizer
    state, saved activations and temporaries alike. What existed before is counted from when an operation
    first returns it. Not counted: what lies inside one operation (a kernel's workspace), and what is no
    tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """Most bytes alive at once, since the start or the last `reset_peak`."""
        self._sizes: dict[int, int] = {}

    def reset_peak(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        # A storage keeps its Python object, and with it this key, until its memory is freed.
        key, size = id(storage), storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key).atexit = False
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
