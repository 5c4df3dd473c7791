"""Collectives over all ranks: numbers, results and errors that every rank must know."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

T = TypeVar("T")


def gather_numbers(numbers: list[float], device: torch.device) -> npt.NDArray[np.float64]:
    """Return the numbers of all ranks as float64 [world_size, len(numbers)], the same bits on every rank.

    Sums over the result have the same order on each rank, so that all ranks get the same float. The result of
    an all-reduce may differ in the last bit between groups, which can lead to different decisions.
    """
    own = torch.tensor([numbers], dtype=torch.float64, device=device)
    if dist.get_world_size() == 1:
        return cast(npt.NDArray[np.float64], own.cpu().numpy())
    everyone = torch.empty(dist.get_world_size(), len(numbers), dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(everyone, own)
    return cast(npt.NDArray[np.float64], everyone.cpu().numpy())


def on_first_rank(function: Callable[[], T]) -> T:
    """Call `function` on the first rank only and return its result, which is pickled, on all ranks.

    Raises:
        ValueError: On every rank, if the function raised ValueError or OSError.
    """
    outcome: list[tuple[T | None, str | None]] = [(None, None)]
    if dist.get_rank() == 0:
        outcome = [_attempt(function)]
    dist.broadcast_object_list(outcome, src=0)
    result, message = outcome[0]
    if message is not None:
        raise ValueError(message)
    return cast(T, result)


def on_every_rank(function: Callable[[], T]) -> T:
    """Call `function` on every rank and return this rank's result.

    Raises:
        ValueError: On every rank, with the first message, if the function raised ValueError or OSError on any
            rank.
    """
    result, message = _attempt(function)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    for rank, text in enumerate(messages):
        if text is not None:
            raise ValueError(text if rank == 0 else f"rank {rank}: {text}")
    return cast(T, result)


def from_every_rank(function: Callable[[], T]) -> list[T]:
    """Call `function` on every rank and return all results, which are pickled, in rank order.

    Raises:
        ValueError: On every rank, with the first message, if the function raised ValueError or OSError on any
            rank.
    """
    mine = on_every_rank(function)
    results: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(results, mine)
    return cast(list[T], results)


def _attempt(function: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return function(), None
    except (ValueError, OSError) as error:
        return None, str(error)
