"""`--check-ranks-every`: what all ranks must agree on is compared, and the run stops where they do not."""

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
"""Differences that an error tells in full."""


class RanksDiffer(RuntimeError):
    """Ranks that must agree do not. The message names what differs, and each side's ranks: the majority
    first."""


def check_ranks(engine: Engine, mesh: ProcessMesh, agreed: Mapping[str, Any]) -> None:
    """Compare `agreed` on all ranks, and parameters on all ranks that hold the same, bit for bit. Collective.

    Parameters that a tensor rank holds whole are compared across the tensor axis too, tied embeddings across
    the ends of the pipe. Under ZeRO-3 only the small parameters that DeepSpeed keeps whole are there to
    compare.

    Args:
        agreed: plain JSON values that are the same on every rank.

    Raises:
        RanksDiffer: on every rank, with the same message.
    """
    mine = {name: json.dumps(value, sort_keys=True) for name, value in agreed.items()} | _digests(
        engine, mesh
    )
    everyone: list[dict[str, str]] = [{}] * mesh.world_size
    dist.all_gather_object(everyone, mine)
    if differences := _differences(everyone):
        told = "; ".join(differences[:MOST_NAMES])
        more = f"; and {len(differences) - MOST_NAMES} more" if len(differences) > MOST_NAMES else ""
        raise RanksDiffer(f"ranks differ in {told}{more}")


def _digests(engine: Engine, mesh: ProcessMesh) -> dict[str, str]:
    """A digest of every parameter, by a name that the ranks have in common which must hold the same."""
    found = {}
    for name, parameter in engine.named_weights().items():
        if parameter.numel():  # ZeRO-3 leaves nothing of a parameter that it has sharded
            part = f" (shard {mesh.tensor.rank})" if shard_of(parameter) else ""
            found[f"parameter {name}{part}"] = _digest(parameter)
    return found


@torch.no_grad()
def _digest(tensor: Tensor) -> str:
    content = tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _differences(everyone: Sequence[Mapping[str, str]]) -> list[str]:
    """What each rank says of each name, where not all that know the name say the same."""
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
