"""Comparison of the state that all ranks must share, for `--check-ranks-every`."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine import Engine
from megatron_adalrs.parallel.layers import shard_of

MOST_NAMES = 8
"""Number of differences that the error message lists."""


class RanksDiffer(RuntimeError):
    """Error raised when ranks differ. Its message lists the values and their ranks, the majority first."""


def check_ranks(engine: Engine, mesh: ProcessMesh, agreed: Mapping[str, Any]) -> None:
    """Compare values and parameters of all ranks bit for bit. Collective.

    A parameter is compared across all ranks that hold it: also across the tensor-parallel axis if it is not
    sharded, and between the first and last pipeline stage for tied embeddings. With ZeRO-3, only the small
    parameters that DeepSpeed does not partition are compared.

    Args:
        engine: Engine whose parameters are compared.
        mesh: Place of this process.
        agreed: Values of JSON types that must be equal on all ranks.

    Raises:
        RanksDiffer: Ranks differ; raised on every rank with the same message.
    """
    mine = {name: json.dumps(value, sort_keys=True) for name, value in agreed.items()} | _digests(
        engine, mesh
    )
    everyone: list[dict[str, str]] = [{}] * mesh.world_size
    dist.all_gather_object(everyone, mine)
    if differences := _differences(everyone):
        listed = "; ".join(differences[:MOST_NAMES])
        more = f"; and {len(differences) - MOST_NAMES} more" if len(differences) > MOST_NAMES else ""
        raise RanksDiffer(f"ranks differ in {listed}{more}")


def _digests(engine: Engine, mesh: ProcessMesh) -> dict[str, str]:
    """Return a digest of every parameter by a name that ranks with the same shard share."""
    found = {}
    for name, parameter in engine.named_weights().items():
        if parameter.numel():  # empty if ZeRO-3 has partitioned it
            part = f" (shard {mesh.tensor.rank})" if shard_of(parameter) else ""
            found[f"parameter {name}{part}"] = _digest(parameter)
    return found


@torch.no_grad()
def _digest(tensor: Tensor) -> str:
    content = tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _differences(everyone: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a description of every name whose values differ between the ranks that have it."""
    found = []
    names = dict.fromkeys(name for facts in everyone for name in facts)
    for name in names:
        sides: dict[str, list[int]] = defaultdict(list)
        for rank, facts in enumerate(everyone):
            if name in facts:
                sides[facts[name]].append(rank)
        if len(sides) > 1:
            ordered = sorted(sides.items(), key=lambda side: -len(side[1]))
            found.append(f"{name} ({', '.join(f'{_named(ranks)}: {value}' for value, ranks in ordered)})")
    return found


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
