"""Rank, world size and local rank from the environment variables of several launchers."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

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
    """
    if "RANK" in environment:
        return
    for names in OTHER_LAUNCHERS:
        if all(name in environment for name in names):
            environment.update(zip(RANK_WORLD_LOCAL, (environment[name] for name in names), strict=True))
            return
