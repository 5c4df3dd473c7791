"""Where this process stands among the others."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One direction of the grid: this process's coordinate and the number of processes along it."""

    rank: int
    size: int


@dataclass(frozen=True)
class Grid:
    """The grid of processes. Data parallelism is its only axis so far, so it spans the world."""

    data: Axis
    local_rank: int = 0
    """Rank within this host, which picks the device."""

    @property
    def rank(self) -> int:
        return self.data.rank

    @property
    def world_size(self) -> int:
        return self.data.size

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all: it prints and writes what every rank knows."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> Grid:
        """Grid of the ranks that the launcher announced in RANK and WORLD_SIZE; a single process without them."""
        rank, size, local_rank = (
            int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
        return cls(data=Axis(rank, size), local_rank=local_rank)
