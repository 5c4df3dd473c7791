"""Rank, world and place within the host, from whichever launcher started this process."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

RANK_WORLD_LOCAL = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
OTHER_LAUNCHERS = (
    # Of `srun`, not of the script of a batch job: that one runs on its own.
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
)


def adopt_launch_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK where `srun` or `mpirun` say them in words of their own.

    The `deepspeed` launcher and `torchrun` set them themselves, which is left as it is; so is a process on
    its own. MASTER_ADDR and MASTER_PORT are the job script's to say.
    """
    if "RANK" in environment:
        return
    for names in OTHER_LAUNCHERS:
        if all(name in environment for name in names):
            environment.update(zip(RANK_WORLD_LOCAL, (environment[name] for name in names), strict=True))
            return
