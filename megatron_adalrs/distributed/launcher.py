"""Rank, world size and local rank from the environment variables of several launchers."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

RANK_WORLD_LOCAL = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
OTHER_LAUNCHERS = (
    # `srun` sets the second one for its processes only, not for the script of a batch job.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


def adopt_launch_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK from the variables of `srun` or `mpirun`.

    If RANK is set, as by `deepspeed` and `torchrun`, or if there was no launcher, nothing changes. The script
    of the job must set MASTER_ADDR and MASTER_PORT.

    Raises:
        ValueError: The variables contradict each other or are not valid.
    """
    if "RANK" not in environment:
        for names in OTHER_LAUNCHERS:
            if all(name in environment for name in names):
                environment.update(zip(RANK_WORLD_LOCAL, (environment[name] for name in names), strict=True))
                break
    _check_ranks(environment)


def _check_ranks(environment: Mapping[str, str]) -> None:
    values = {name: _count(name, environment[name]) for name in RANK_WORLD_LOCAL if name in environment}
    if ("RANK" in values) != ("WORLD_SIZE" in values):
        given, missing = ("RANK", "WORLD_SIZE") if "RANK" in values else ("WORLD_SIZE", "RANK")
        raise ValueError(
            f"the environment sets {given} ({values[given]}) but not {missing}: a launcher such as deepspeed "
            f"or torchrun sets both; to start one process without a launcher, unset {given}"
        )
    size = values.get("WORLD_SIZE", 1)
    if size < 1:
        raise ValueError(f"WORLD_SIZE: {size}: required at least 1")
    for name in ("RANK", "LOCAL_RANK"):
        if values.get(name, 0) >= size:
            raise ValueError(
                f"{name}: {values[name]}: required 0 to {size - 1}, the ranks of WORLD_SIZE {size}; a "
                "launcher such as deepspeed or torchrun sets both"
            )


def _count(name: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(
            f"{name}: {text!r}: required a whole number of at least 0 in this environment variable"
        )
    return int(text)
