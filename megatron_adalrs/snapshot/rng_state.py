"""Every random stream of this process, as plain JSON values."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron_adalrs.utils.format import first_line


def seed_everything(seed: int, tensor_group: int) -> None:
    """Seed python, numpy and torch. Tensor groups differ, so that their dropout does; the ranks of one
    agree."""
    random.seed(seed + tensor_group)
    np.random.seed((seed + tensor_group) % 2**32)
    torch.manual_seed(seed + tensor_group)


def random_state() -> dict[str, Any]:
    """The streams of python, numpy, torch and, where there is one, the current GPU."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _to_hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _to_hex(torch.cuda.get_rng_state())
    return state


def check_random_state(state: Any) -> None:
    """Check that `set_random_state` can put `state` back; no stream of this process changes.

    Raises:
        ValueError: names the stream that it cannot.
    """
    tries: dict[str, Callable[[Any], Any]] = {"python": _try_python, "numpy": _try_numpy, "torch": _try_torch}
    for name, attempt in tries.items():
        try:
            attempt(state[name])
        except (KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
            raise ValueError(f"{name} is no state of a random stream ({first_line(error)})") from None
    if not isinstance(state.get("cuda", ""), str):
        raise ValueError("cuda is no state of a random stream")


def _try_python(saved: Any) -> None:
    version, words, gauss = saved
    if not all(type(word) is int and 0 <= word < 2**32 for word in words[:-1]):
        raise ValueError("words of 32 bits are required")
    random.Random().setstate((version, tuple(words), gauss))


def _try_numpy(saved: Any) -> None:
    kind, keys, position, has_gauss, cached = saved
    if type(position) is not int or not 0 <= position <= len(keys):  # numpy would read beyond them
        raise ValueError(f"position {position!r:.20}: required 0 to {len(keys)}")
    np.random.RandomState().set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def _try_torch(saved: Any) -> None:
    torch.Generator().set_state(_from_hex(saved))


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned, in this process or another."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_hex(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))


def _to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
