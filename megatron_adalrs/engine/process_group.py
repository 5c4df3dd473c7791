"""The process group of a run, and properties of the accelerator that DeepSpeed uses."""

from __future__ import annotations

import os
from datetime import timedelta

import deepspeed
import deepspeed.ops
import psutil
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]  # not in __all__
from torch.distributed.rendezvous import rendezvous as torch_rendezvous

from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.distributed.rendezvous import rendezvous
from megatron_adalrs.engine.extension_locks import remove_abandoned_locks


def init_distributed(mesh: ProcessMesh, timeout_minutes: float = 10.0) -> str:
    """Start the process group with the ranks that the launcher announced: nccl on GPUs, gloo on CPUs.

    A single process needs no launcher. If the process group exists already, nothing is done.

    Args:
        mesh: this process's place in the mesh; groups are not needed.
        timeout_minutes: limit for the start and for each later collective.

    Returns:
        A name of this attempt to run the job, the same on every rank; empty for a single process and if the
        process group existed already.

    Raises:
        RuntimeError: from torch.distributed, if the ranks do not connect in time.
    """
    if dist.is_initialized():
        return ""
    accelerator = get_accelerator()
    on_cpu = computes_on_cpu()
    if not on_cpu:
        accelerator.set_device(mesh.local_rank)
    backend = "gloo" if on_cpu else accelerator.communication_backend_name()
    timeout = timedelta(minutes=timeout_minutes)
    os.environ.setdefault("LOCAL_RANK", str(mesh.local_rank))  # DeepSpeed reads it also without a launcher
    if mesh.world_size == 1:
        attempt = ""
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        store, rank, world_size = next(torch_rendezvous("env://", timeout=timeout))
        attempt = rendezvous(store, rank, world_size, timeout)
        own = PrefixStore(attempt, store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=timeout)
    remove_abandoned_locks(report=lambda text: print(text, flush=True))
    # On CPUs DeepSpeed would compile, for half a minute, an all-reduce that only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return attempt


def require_supported(precision: str) -> None:
    """Check that the accelerator supports a precision.

    Raises:
        ValueError: the precision is fp16 and the accelerator does not support it.
    """
    accelerator = get_accelerator()
    if precision == "fp16" and not accelerator.is_fp16_supported():
        raise ValueError(f"fp16: not supported on {accelerator.device_name()}; use --bf16")


def end_distributed() -> None:
    """Destroy the process group, without which a process may crash at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def computes_on_cpu() -> bool:
    """Return whether ranks of this machine compute on CPUs."""
    return bool(get_accelerator().device_name() == "cpu")


def deepspeed_version() -> str:
    """Return the version of DeepSpeed that is installed."""
    return str(deepspeed.__version__)


def memory_bytes() -> int:
    """Return the memory that this process holds: on the accelerator, or resident memory on CPUs."""
    if computes_on_cpu():
        return int(psutil.Process().memory_info().rss)
    return int(get_accelerator().memory_allocated())
