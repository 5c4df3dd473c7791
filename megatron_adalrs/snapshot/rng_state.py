"""State of the global random number generators of this process."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_adalrs.utils.format import first_line


def seed_everything(seed: int, tensor_group: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch.

    The seed differs between tensor-parallel groups, so that their dropout differs, and is equal on all ranks
    of a group.
    """
    random.seed(seed + tensor_group)
    np.random.seed((seed + tensor_group) % 2**32)
    torch.manual_seed(seed + tensor_group)


@dataclass(frozen=True)
class RngState:
    """State of the generators of Python, NumPy, PyTorch and, if this process has used a GPU, CUDA."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: Tensor
    cuda: dict[int, Tensor]
    """Generator state of each device, by device index."""

    @classmethod
    def capture(cls) -> RngState:
        """Return the current state of all generators."""
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch has no annotation here
        cuda = torch.cuda.get_rng_state_all() if in_use else []
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(legacy=False),
            torch=torch.get_rng_state(),
            cuda=dict(enumerate(cuda)),
        )

    def restore(self) -> None:
        """Set every generator to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values; for CUDA, only the state of the current device."""
        version, values, gauss = self.python
        bits = self.numpy["state"]
        state: dict[str, Any] = {
            "python": [version, list(values), gauss],
            "numpy": [
                self.numpy["bit_generator"],
                bits["key"].tolist(),
                int(bits["pos"]),
                int(self.numpy["has_gauss"]),
                float(self.numpy["gauss"]),
            ],
            "torch": _to_hex(self.torch),
        }
        if self.cuda:
            state["cuda"] = _to_hex(self.cuda[torch.cuda.current_device()])
        return state

    @classmethod
    def from_json(cls, state: Any) -> RngState:
        """Return the state that `to_json` has written, after validation; no generator changes.

        A CUDA state is assigned to the current device, and ignored if there is no GPU.

        Raises:
            ValueError: If a generator does not accept its state; the message names the generator.
        """
        python = _parse(state, "python", _python_from_json)
        numpy = _parse(state, "numpy", _numpy_from_json)
        cpu = _parse(state, "torch", _torch_from_json)
        if "cuda" not in state or not torch.cuda.is_available():
            return cls(python, numpy, cpu, {})
        return cls(python, numpy, cpu, {torch.cuda.current_device(): _parse(state, "cuda", _from_hex)})


def _parse(state: Any, name: str, parse: Callable[[Any], Any]) -> Any:
    try:
        return parse(state[name])
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{name} is not the state of a random generator ({first_line(error)})") from None


def _python_from_json(saved: Any) -> tuple[Any, ...]:
    version, values, gauss = saved
    if not all(type(value) is int and 0 <= value < 2**32 for value in values[:-1]):
        raise ValueError("32-bit integers are required")
    state = (version, tuple(values), gauss)
    random.Random().setstate(state)
    return state


def _numpy_from_json(saved: Any) -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = saved
    if type(position) is not int or not 0 <= position <= len(keys):  # NumPy would read beyond the keys
        raise ValueError(f"position {position!r:.20} must be from 0 to {len(keys)}")
    generator = np.random.RandomState()
    generator.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    return dict(generator.get_state(legacy=False))


def _torch_from_json(saved: Any) -> Tensor:
    state = _from_hex(saved)
    torch.Generator().set_state(state)
    return state


def _to_hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
