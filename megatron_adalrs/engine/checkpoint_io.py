"""DeepSpeed's checkpoint files, written directly or from a copy while training continues.

DeepSpeed calls `save` between barriers. An exception there, on one rank, would leave the others waiting at
the next barrier. So errors are kept until `finish`, which every rank calls.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (
    CheckpointCommitInfo,
    CheckpointEngine,
)
from torch import Tensor

from megatron_adalrs.utils.format import first_line


class CheckpointFiles(CheckpointEngine):  # type: ignore[misc]  # DeepSpeed is untyped
    """Writes the checkpoint files of one rank.

    After `begin(copied=True)`, `save` copies tensors to host memory, and `start` writes them in a thread. The
    memory is reused for the next copy, since its allocation takes longer than the copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copied_bytes = 0
        """Size of the last copy."""
        self._copied = False
        self._jobs: list[tuple[Any, Path]] = []
        # In the order in which DeepSpeed saves tensors, which is always the same.
        self._buffers: list[Tensor] = []
        self._used = 0
        self._digests: dict[Path, str] = {}
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None

    # Methods that DeepSpeed calls

    def create(self, info: CheckpointCommitInfo) -> None:
        """Do nothing before a checkpoint."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder; an error is kept until `finish`."""
        try:
            super().makedirs(path, exist_ok)
        except OSError as error:
            self._error = self._error or error

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file, or copy its content for `start`."""
        if self._copied:
            self._jobs.append((self._copy(state_dict), Path(path)))
        else:
            self._write(state_dict, Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Unpickle a file. It contains objects of DeepSpeed, so the checkpoint must be trusted."""
        return torch.load(path, map_location=map_location, weights_only=False)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Report success; errors are reported by `finish`."""
        return True

    def preserves_storage_sharing(self) -> bool:
        """Return False while copying: copies do not share memory, so DeepSpeed need not clone views."""
        return not self._copied

    def attempt(self, function: Callable[..., Any]) -> Callable[..., None]:
        """Return the function with its OSErrors kept until `finish`."""

        def attempted(*arguments: Any) -> None:
            try:
                function(*arguments)
            except OSError as error:
                self._error = self._error or error

        return attempted

    # Methods that the engine calls

    def begin(self, copied: bool) -> None:
        """Prepare for DeepSpeed's `save_checkpoint`. The last checkpoint must be finished."""
        assert self._thread is None, "two saves overlap"
        self._copied = copied
        self._jobs = []
        self._digests = {}
        self._error = None
        self._used = 0
        self.copied_bytes = 0

    def start(self, secure: Callable[[Path], str]) -> None:
        """Start a thread that writes what was copied.

        Args:
            secure: called with each file that was written; flushes it to disk and returns its digest.
        """
        self._copied = False
        get_accelerator().synchronize()
        self._thread = threading.Thread(target=self._write_all, args=(secure,), name="checkpoint-writer")
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether the thread is running."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> dict[Path, str]:
        """Wait for the files.

        Returns:
            The digests of the files that `secure` was called with.

        Raises:
            OSError: a file could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error = self._error
            self._error = None
            raise error
        return self._digests

    def abandon(self) -> None:
        """Wait for the files and ignore errors."""
        with contextlib.suppress(OSError):
            self.finish()

    def _write_all(self, secure: Callable[[Path], str]) -> None:
        while self._jobs:
            state_dict, path = self._jobs.pop(0)
            self._write(state_dict, path, secure)

    def _write(self, state_dict: Any, path: Path, secure: Callable[[Path], str] | None = None) -> None:
        if self._error is not None:
            return
        try:
            torch.save(state_dict, path)
            if secure is not None:
                self._digests[path] = secure(path)
        except Exception as error:  # torch raises a RuntimeError for a full disk
            self._error = OSError(f"cannot write to {path}: {first_line(error)}")

    def _copy(self, state: Any) -> Any:
        """Return a copy with its tensors in host memory, which training does not change."""
        if isinstance(state, Tensor):
            return self._copy_tensor(state)
        if isinstance(state, dict):
            copied = state.__class__()
            if hasattr(state, "_metadata"):  # the state dict of a module
                copied._metadata = state._metadata  # type: ignore[attr-defined]  # an attribute of torch's
            copied.update((name, self._copy(value)) for name, value in state.items())
            return copied
        if isinstance(state, (list, tuple)):
            values: Iterator[Any] = (self._copy(value) for value in state)
            return state.__class__(*values) if hasattr(state, "_fields") else state.__class__(values)
        return copy.deepcopy(state)

    def _copy_tensor(self, tensor: Tensor) -> Tensor:
        index = self._used
        self._used += 1
        if index == len(self._buffers):
            self._buffers.append(torch.empty(0))
        buffer = self._buffers[index]
        if buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pinned = tensor.device.type != "cpu"
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
            self._buffers[index] = buffer
        buffer.copy_(tensor.detach(), non_blocking=True)
        self.copied_bytes += buffer.nbytes
        return buffer
