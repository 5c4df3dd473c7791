"""The plan of a run as a person reads it."""

from __future__ import annotations

import io

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_adalrs.distributed.process_mesh import AXES
from megatron_adalrs.planning.memory import RunPlan
from megatron_adalrs.utils.format import quantity

MOST_ROWS = 16
"""Worlds of more ranks are shown a row a stage."""
WIDTH = 120
NAMES = {"pipe": "stage", "data": "replica", "context": "part", "tensor": "shard"}
ORDER = "Ranks count with the shard fastest, then the part of the sequence, the replica and the stage."
NOT_COUNTED = (
    "peak: the most at once, less than the sum, for activations are gone when the optimizer works.\n"
    "Not counted: the device's context, the allocator's fragmentation, buffers inside collectives."
)


def describe(plan: RunPlan) -> str:
    """The mesh, what each rank holds, and what a step is: one short line for a single rank, otherwise a
    table."""
    if plan.shape.world_size == 1:
        return f"{_in_one_line(plan)}\n{_step(plan)}"
    kind = f"Memory of one rank, estimated for {_devices(plan)}, 1 GB = 10^9 B;\n{NOT_COUNTED}"
    order = [ORDER] if plan.shape.world_size > MOST_ROWS else []
    return "\n".join([_rendered(_table(plan)), *order, kind, _step(plan)])


def _devices(plan: RunPlan) -> str:
    return "CPUs" if plan.on_cpu else "accelerators"


def _in_one_line(plan: RunPlan) -> str:
    rank = plan.stages[0]
    parts = ("weights", "gradients", "optimizer", "activations", "buffers")
    sizes = ", ".join(f"{name} {quantity(size, 'B')}" for name in parts if (size := getattr(rank, name)))
    host = f", {quantity(rank.offloaded, 'B')} of it on the host" if rank.offloaded else ""
    snapshots = f"; snapshots {quantity(rank.snapshot, 'B')} on the host" if rank.snapshot else ""
    at_most = f"at most {quantity(rank.peak, 'B')} at once"
    return f"memory, estimated for {_devices(plan)}: {at_most} ({sizes}){host}{snapshots}"


def _table(plan: RunPlan) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, show_edge=False, padding=(0, 0, 0, 1))
    axes = [axis for axis in AXES if getattr(plan.shape, axis) > 1]
    for name in ("rank", *(NAMES[axis] for axis in axes)):
        table.add_column(name, no_wrap=True)
    columns = ["parameters", "weights", "gradients", "optimizer", "activations", "buffers", "peak"]
    columns += [
        name for name in ("offloaded", "snapshot") if any(getattr(rank, name) for rank in plan.stages)
    ]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for ranks in _rows(plan):
        places = [plan.shape.coordinates(rank) for rank in (ranks[0], ranks[-1])]
        held = plan.stages[places[0]["pipe"]]
        sizes = [quantity(getattr(held, name), "B") for name in columns[1:]]
        where = [_range(*(place[axis] for place in places)) for axis in axes]
        table.add_row(_range(ranks[0], ranks[-1]), *where, quantity(held.part.parameters, ""), *sizes)
    return table


def _rows(plan: RunPlan) -> list[range]:
    """Ranks of each row. A stage's are consecutive, since the pipe is the slowest axis."""
    world = plan.shape.world_size
    size = 1 if world <= MOST_ROWS else world // plan.shape.pipe
    return [range(first, first + size) for first in range(0, world, size)]


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _step(plan: RunPlan) -> str:
    micro, count, data = plan.config.training.micro_batch_size, plan.micro_batches, plan.shape.data
    text = (
        f"a step: {plan.global_batch_size} samples = {data} replica(s) x {count} micro-batch(es) of {micro}, "
        f"{plan.global_batch_size * plan.config.model.seq_length} tokens"
    )
    if (stages := plan.shape.pipe) > 1:
        text += f"; pipeline bubble {stages - 1}/({count} + {stages - 1}) = {plan.bubble:.1%}"
    return text


def _rendered(table: Table) -> str:
    page = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    page.print(table)
    return "\n".join(line.rstrip() for line in page.file.getvalue().splitlines()).rstrip()  # type: ignore[attr-defined]
