"""`--dry-run`: the plan of a run as text, without its ranks, memory or data."""

from __future__ import annotations

import io
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_adalrs.config import Config
from megatron_adalrs.data.pair_files import require_pairs
from megatron_adalrs.data.vocabulary import known_vocabulary, resolve_vocabulary
from megatron_adalrs.distributed.process_mesh import AXES, MeshShape
from megatron_adalrs.engine import computes_on_cpu
from megatron_adalrs.model.gpt import count_parameters
from megatron_adalrs.planning.memory import RunPlan, plan_run
from megatron_adalrs.utils.format import quantity

MOST_ROWS = 16
"""Largest number of ranks that have a row each; with more, a stage has one row."""
WIDTH = 120
NAMES = {"pipe": "stage", "data": "replica", "context": "part", "tensor": "shard"}
ORDER = "Rank numbers increase along shards first, then parts of the sequence, replicas and stages."
NOT_COUNTED = (
    "peak: maximum at one time; less than the sum, since activations are freed before the optimizer step.\n"
    "Not counted: the device's context, the allocator's fragmentation, buffers inside collectives."
)


def dry_run(config: Config) -> str:
    """Return the plan of a run on `--world-size` ranks, or on the number of ranks of the launcher.

    Joins no process group and writes nothing. A corpus that does not exist is listed; it is an error only
    if the vocabulary is not known without it.

    Raises:
        ValueError, OSError: A run would reject its configuration, vocabulary or mesh.
    """
    world_size = config.run.world_size or int(os.environ.get("WORLD_SIZE", "1"))
    shape = MeshShape.of_world(world_size, **config.parallel.sizes)
    missing = [corpus.prefix for corpus in config.data.corpora if not Path(f"{corpus.prefix}.idx").exists()]
    vocab_size = _vocab_size(config, bool(missing))
    plan = plan_run(config, vocab_size, shape, computes_on_cpu())
    lines = [
        f"dry run: {quantity(count_parameters(config.model, vocab_size), 'parameters')} on "
        f"{shape.world_size} rank(s), ZeRO-{config.training.zero_stage}, {config.training.precision}",
        describe(plan),
    ]
    lines += [f"data_path: there is no {prefix}.idx yet; a run needs it" for prefix in missing]
    return "\n".join(lines)


def _vocab_size(config: Config, is_missing: bool) -> int:
    if not is_missing:
        return resolve_vocabulary(config).size
    if config.model.vocab_size is None and config.data.tokenizer_type is None:
        try:
            require_pairs(config.data)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; a plan without the data needs --vocab-size") from None
    return known_vocabulary(config).size


def describe(plan: RunPlan) -> str:
    """Describe the mesh, the memory of each rank and the size of a step.

    Returns:
        One line on memory for a single rank, otherwise a table; then a line on the step.
    """
    if plan.shape.world_size == 1:
        return f"{_in_one_line(plan)}\n{_step(plan)}"
    kind = f"Memory of one rank, estimated for {_devices(plan)}, 1 GB = 10^9 B;\n{NOT_COUNTED}"
    order = [ORDER] if plan.shape.world_size > MOST_ROWS else []
    return "\n".join([_rendered(_table(plan)), *order, kind, _step(plan)])


SHORT = {
    "parameters": "params",
    "gradients": "grads",
    "optimizer": "optim.",
    "activations": "acts.",
    "offloaded": "offl.",
    "snapshot": "snap.",
}
"""Headings of columns, short so that a row fits on a line of the console."""


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
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1))
    axes = [axis for axis in AXES if getattr(plan.shape, axis) > 1]
    for name in ("rank", *(NAMES[axis] for axis in axes)):
        table.add_column(name, no_wrap=True)
    columns = ["parameters", "weights", "gradients", "optimizer", "activations", "buffers", "peak"]
    columns += [
        name for name in ("offloaded", "snapshot") if any(getattr(rank, name) for rank in plan.stages)
    ]
    for name in columns:
        table.add_column(SHORT.get(name, name), justify="right", no_wrap=True)
    for ranks in _rows(plan):
        places = [plan.shape.coordinates(rank) for rank in (ranks[0], ranks[-1])]
        held = plan.stages[places[0]["pipe"]]
        sizes = [quantity(getattr(held, name), "B") for name in columns[1:]]
        where = [_range(*(place[axis] for place in places)) for axis in axes]
        table.add_row(_range(ranks[0], ranks[-1]), *where, quantity(held.part.parameters, ""), *sizes)
    return table


def _rows(plan: RunPlan) -> list[range]:
    """Return the ranks of each row. Those of a stage are consecutive: the pipeline is the slowest axis."""
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
    page = io.StringIO()
    Console(file=page, width=WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines()).rstrip()
