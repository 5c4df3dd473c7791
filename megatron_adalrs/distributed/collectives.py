"""Agreement between ranks on numbers and on errors. Every function is a collective of the whole world."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")


def gather_numbers(numbers: list[float], device: torch.device) -> np.ndarray:
    """Every rank's numbers, float64 [world size, len(numbers)], the same bits everywhere.

    Sums over the result are taken in rank order on each rank, so all ranks get the same float: an all-reduce
    in different groups may differ in the last bit, enough to split a decision.
    """
    mine = torch.tensor([numbers], dtype=torch.float64, device=device)
    if dist.get_world_size() == 1:
        return mine.cpu().numpy()
    everyone = torch.empty(dist.get_world_size(), len(numbers), dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(everyone, mine)
    return everyone.cpu().numpy()


def on_first_rank(function: Callable[[], T]) -> T:
    """Result of `function`, called on the first rank only; it is pickled to the others.

    Raises:
        ValueError: on every rank, if the function raised ValueError or OSError there.
    """
    outcome: list[tuple[T | None, str | None]] = [(None, None)]
    if dist.get_rank() == 0:
        outcome = [_attempt(function)]
    dist.broadcast_object_list(outcome, src=0)
    result, message = outcome[0]
    if message is not None:
        raise ValueError(message)
    return result  # type: ignore[return-value]


def on_every_rank(function: Callable[[], T]) -> T:
    """This rank's result of `function`, called on every rank.

    Raises:
        ValueError: on every rank, with the first message, if the function raised ValueError or OSError on
            any.
    """
    result, message = _attempt(function)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    for rank, text in enumerate(messages):
        if text is not None:
            raise ValueError(text if rank == 0 else f"rank {rank}: {text}")
    return result  # type: ignore[return-value]


def from_every_rank(function: Callable[[], T]) -> list[T]:
    """Every rank's result of `function`, in rank order, on all of them; the results are pickled.

    Raises:
        ValueError: on every rank, with the first message, if the function raised ValueError or OSError on
            any.
    """
    mine = on_every_rank(function)
    results: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(results, mine)
    return results  # type: ignore[return-value]


def _attempt(function: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return function(), None
    except (ValueError, OSError) as error:
        return None, str(error)
