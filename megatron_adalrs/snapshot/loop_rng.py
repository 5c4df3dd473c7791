"""The random-number streams of a process, saved and put back."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RngState:
    """The global streams of python, numpy, torch and, where it is in use, CUDA (one a device)."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: Tensor
    cuda: tuple[Tensor, ...]

    @classmethod
    def capture(cls) -> RngState:
        """The streams as they are now. CUDA's are left out while this process has not used a GPU."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), tuple(cuda))

    def restore(self) -> None:
        """Put every captured stream back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
