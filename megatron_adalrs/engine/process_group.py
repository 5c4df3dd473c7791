"""This process under DeepSpeed: the import, kept quiet, the process group, and what the accelerator holds."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta

import psutil
import torch.distributed as dist

from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.distributed.rendezvous import rendezvous
from megatron_adalrs.engine.extension_locks import remove_abandoned_locks

# DeepSpeed's banner at import and its use of collectives that torch has renamed tell a user nothing.
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


_attempt = ""


def init_distributed(mesh: ProcessMesh, timeout_minutes: float = 10.0) -> str:
    """Join the process group that the launcher announced: nccl on GPUs, gloo on CPUs. A lone process needs no
    address.

    Joins nothing in a process that has joined one.

    Returns:
        The name of this attempt to run the job, the same on every rank; empty for a lone process.

    Raises:
        RuntimeError: of torch.distributed, when the ranks do not find each other in time.
    """
    global _attempt
    if dist.is_initialized():
        return _attempt
    accelerator = get_accelerator()
    on_cpu = computes_on_cpu()
    if not on_cpu:
        accelerator.set_device(mesh.local_rank)
    backend = "gloo" if on_cpu else accelerator.communication_backend_name()
    timeout = timedelta(minutes=timeout_minutes)
    os.environ.setdefault("LOCAL_RANK", str(mesh.local_rank))  # DeepSpeed reads it, launcher or not
    if mesh.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        _attempt = rendezvous(store, rank, world_size, timeout)
        own = dist.PrefixStore(_attempt, store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=timeout)
    remove_abandoned_locks(tell=lambda text: print(text, flush=True))
    # On processors DeepSpeed compiles, for half a minute, an all-reduce that only its inference calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return _attempt


def require_supported(precision: str) -> None:
    """Whether the accelerator computes in a precision.

    Raises:
        ValueError: float16 on a processor.
    """
    accelerator = get_accelerator()
    if precision == "fp16" and not accelerator.is_fp16_supported():
        raise ValueError(f"fp16: not supported on {accelerator.device_name()}; use --bf16")


def end_distributed() -> None:
    """Leave the process group. A process that exits inside one may die in its destructors."""
    if dist.is_initialized():
        dist.destroy_process_group()


def computes_on_cpu() -> bool:
    """Whether ranks of this machine compute on CPUs."""
    return get_accelerator().device_name() == "cpu"


def deepspeed_version() -> str:
    return deepspeed.__version__


def memory_bytes() -> int:
    """Memory that this process holds: the accelerator's, or resident main memory where there is none."""
    return psutil.Process().memory_info().rss if computes_on_cpu() else get_accelerator().memory_allocated()
