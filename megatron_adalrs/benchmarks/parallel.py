"""Two ranks of one thread each, in every way of sharing the work, against one rank on the same global batch.

Each mesh has processes of its own, which are started once and wait on a pipe, idle, while others run. In
every block each takes a step; ratios are taken block by block and their median is quoted, so that a machine
whose speed drifts favours nobody. A machine that others use makes two ranks wait for each other: how two
processes do that have nothing to do with each other is measured beside it, and tells what the machine had to
give.

Memory is counted over the building of the engine and two steps before any time is taken: all tensors alive,
each storage once (live_memory.py), the most at once. Where there is a GPU, its allocator's own count is taken
instead.

What limits two ranks on two cores: every message between them takes both of them processor time, gradients
are summed in memory that both share, and a pipeline is as fast as its slower stage, here the one with the
loss.
"""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from megatron_adalrs.distributed.local_ranks import THREADS_PER_RANK, LocalRanks

VOCABULARY = 512
MODEL = {
    "preset": "gpt2-tiny",
    "num_layers": 6,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "seq_length": 256,
    "micro_batch_size": 2,
    "global_batch_size": 16,
    "train_iters": 100_000,
    "lr": 1e-4,
    "data_path": "none",
}
ONE = "one_rank"
GRIDS: dict[str, dict[str, int]] = {
    ONE: {},
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}


def measure_parallel(zero_stage: int, bf16: bool, blocks: int) -> dict[str, Any]:
    """Speed and memory of each mesh.

    Args:
        zero_stage: 0 or 1, which a pipeline allows.
        blocks: that count; one more is run first and left out.
    """
    values = MODEL | {"zero_stage": zero_stage, "bf16": bf16}
    cells = {
        name: LocalRanks(1 if name == ONE else 2, serve, values | sizes) for name, sizes in GRIDS.items()
    }
    stranger = LocalRanks(1, serve, values)
    try:
        memory = {name: cell.ask("memory") for name, cell in cells.items()}
        stranger.ask("memory")
        seconds = []
        for _ in range(blocks + 1):
            block = {name: max(cell.ask("step")) for name, cell in cells.items()}
            cells[ONE].send("step")
            stranger.send("step")
            block["strangers"] = max(*cells[ONE].receive(), *stranger.receive())
            seconds.append(block)
    finally:
        for cell in (*cells.values(), stranger):
            cell.close()
    tokens = MODEL["global_batch_size"] * MODEL["seq_length"]  # type: ignore[operator]
    counted = {name: np.array([block[name] for block in seconds[1:]]) for name in seconds[0]}
    results: dict[str, Any] = {"model": values, "threads_of_a_rank": THREADS_PER_RANK, "blocks": blocks}
    given = 2 * float(np.median(counted[ONE] / counted["strangers"]))
    results["two_strangers_against_one_rank"] = given
    for name in cells:
        results[name] = {"tokens_per_second": tokens / float(np.median(counted[name])), "ranks": memory[name]}
        if name != ONE:
            ratio = float(np.median(counted[ONE] / counted[name]))
            against_strangers = float(np.median(counted["strangers"] / counted[name])) / 2
            results[name] |= {
                "against_one_rank": ratio,
                "of_ideal": ratio / 2,
                "of_strangers": against_strangers,
            }
    results["pp2"] |= predicted_pipeline(results["pp2"]["against_one_rank"], given, memory["pp2"])
    return results


def predicted_pipeline(measured: float, given: float, ranks: list[dict[str, Any]]) -> dict[str, float]:
    """What the bubble alone allows, and the bubble with stages whose work is not equal.

    Args:
        measured: speed against one rank.
        given: speed of two processes that have nothing to do with each other against one.
    """
    micro_batches = MODEL["global_batch_size"] // MODEL["micro_batch_size"]  # type: ignore[operator]
    filled = micro_batches / (micro_batches + 1)
    work = [rank["matrix_parameters"] for rank in ranks]
    balance = sum(work) / max(work) / 2
    return {
        "bubble": 1 - filled,
        "predicted_by_bubble": 2 * filled,
        "of_predicted_by_bubble": measured / (2 * filled),
        "predicted_by_bubble_and_stages": 2 * filled * balance,
        "of_predicted_by_bubble_and_stages": measured / (2 * filled * balance),
        "of_predicted_on_what_strangers_get": measured / (given * filled * balance),
    }


def serve(pipe: Connection, values: dict[str, Any]) -> None:
    """A rank: build, count memory, then take a step whenever asked."""
    import torch

    from megatron_adalrs.cli.arguments import config_from_values
    from megatron_adalrs.distributed.process_mesh import ProcessMesh
    from megatron_adalrs.engine import build_engine, end_distributed, init_distributed
    from megatron_adalrs.planning.tensor_memory import LiveMemory
    from megatron_adalrs.snapshot.rng_state import seed_everything

    config = config_from_values(values)
    mesh = ProcessMesh.from_environment(**config.parallel.sizes)
    init_distributed(mesh)
    mesh = mesh.with_groups()
    seed_everything(config.training.seed, mesh.tensor_group)
    batches = own_batches(config, mesh)
    assert pipe.recv() == "memory"
    with LiveMemory() as alive:
        engine = build_engine(config, VOCABULARY, mesh)
        engine.train_batch(batches)
        alive.reset_peak()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        engine.train_batch(batches)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else alive.peak
    pipe.send(memory_against_plan(config, mesh, peak))
    while True:
        try:
            pipe.recv()
        except EOFError:
            break
        started = time.perf_counter()
        engine.train_batch(batches)
        pipe.send(time.perf_counter() - started)
    end_distributed()


def own_batches(config: Any, mesh: Any) -> list[np.ndarray]:
    """This rank's micro-batches of one global batch of random tokens, the same on any mesh."""
    shape = (-1, mesh.data.size, config.training.micro_batch_size, config.model.seq_length + 1)
    samples = np.random.default_rng(0).integers(
        0, VOCABULARY, (config.global_batch_size(mesh.data.size), config.model.seq_length + 1)
    )
    return list(samples.reshape(shape)[:, mesh.data.rank])


def memory_against_plan(config: Any, mesh: Any, peak: int) -> dict[str, Any]:
    from megatron_adalrs.engine import computes_on_cpu
    from megatron_adalrs.planning import plan_run

    planned = plan_run(config, VOCABULARY, mesh.shape, computes_on_cpu()).stages[mesh.pipe.rank]
    table = (
        config.model.max_positions * config.model.hidden_size
    )  # learned positions are looked up, not multiplied
    looked_up = table if planned.part.has_embedding else 0
    if planned.part.has_embedding and not planned.part.has_output:
        looked_up += config.model.padded_vocab_size(VOCABULARY, mesh.tensor.size) * config.model.hidden_size
    return {
        "matrix_parameters": planned.part.parameters - looked_up,
        "peak_bytes": peak,
        "planned_bytes": planned.peak,
        "error": planned.peak / peak - 1,
    }
