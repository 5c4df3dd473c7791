"""Current and peak memory of tensors on any device, like `torch.cuda.max_memory_allocated`."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no annotations here
    """Context that counts every storage returned by an operation for as long as it is alive.

    Each storage counts once, at its full size, however many tensors view it: weights, gradients, optimizer
    state, saved activations and temporaries. A storage that existed before counts once an operation returns
    it. Memory inside an operation, such as the workspace of a kernel, is not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations here
        self.now = 0
        """Bytes of the storages that are alive."""
        self.peak = 0
        """Maximum of `now` since the start or the last `reset_peak`."""
        self._sizes: dict[int, int] = {}

    def reset_peak(self) -> None:
        """Set the peak to the current memory."""
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
