"""Benchmark of two ranks with data, tensor and pipeline parallelism against one rank with the same batch.

Every mesh has its own processes, which are started once and wait while others run. In every block each mesh
takes a step, and a result is the median of the ratios of all blocks, so that a drift of the machine's speed
does not favour a mesh. On a machine with other load, two ranks wait for each other; the speed of two
independent processes is measured too, as what the machine can give.

Memory is measured while the engine is built and in two steps before any time is measured: the peak of all
live tensors, with each storage counted once (planning/tensor_memory.py), or on a GPU the allocator's figure.

The limits of two ranks on two cores are: every message takes processor time of both, gradients are summed in
shared memory, and a pipeline is as fast as its slower stage, which is the one with the loss here.
"""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_adalrs.distributed.local_ranks import THREADS_PER_RANK, LocalRanks

if TYPE_CHECKING:
    from megatron_adalrs.config import Config
    from megatron_adalrs.data.loader import MicroBatches
    from megatron_adalrs.distributed.process_mesh import ProcessMesh

VOCABULARY = 512
MODEL: dict[str, Any] = {
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
MESHES: dict[str, dict[str, int]] = {
    ONE: {},
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}


def measure_parallel(zero_stage: int, bf16: bool, blocks: int) -> dict[str, Any]:
    """Measure speed and memory of each mesh.

    Args:
        zero_stage: 0 or 1; a pipeline allows no other stage.
        bf16: Use bfloat16.
        blocks: Number of measured blocks; one more runs first and does not count.
    """
    values = MODEL | {"zero_stage": zero_stage, "bf16": bf16}
    meshes = {
        name: LocalRanks(1 if name == ONE else 2, serve, values | sizes) for name, sizes in MESHES.items()
    }
    independent = LocalRanks(1, serve, values)
    try:
        memory = {name: ranks.ask("memory") for name, ranks in meshes.items()}
        independent.ask("memory")
        seconds = []
        for _ in range(blocks + 1):
            block = {name: max(ranks.ask("step")) for name, ranks in meshes.items()}
            meshes[ONE].send("step")
            independent.send("step")
            block["independent"] = max(*meshes[ONE].receive(), *independent.receive())
            seconds.append(block)
    finally:
        for ranks in (*meshes.values(), independent):
            ranks.close()
    tokens = MODEL["global_batch_size"] * MODEL["seq_length"]
    counted = {name: np.array([block[name] for block in seconds[1:]]) for name in seconds[0]}
    results: dict[str, Any] = {"model": values, "threads_of_a_rank": THREADS_PER_RANK, "blocks": blocks}
    given = 2 * float(np.median(counted[ONE] / counted["independent"]))
    results["two_independent_processes_against_one_rank"] = given
    for name in meshes:
        results[name] = {"tokens_per_second": tokens / float(np.median(counted[name])), "ranks": memory[name]}
        if name != ONE:
            ratio = float(np.median(counted[ONE] / counted[name]))
            against_independent = float(np.median(counted["independent"] / counted[name])) / 2
            results[name] |= {
                "against_one_rank": ratio,
                "of_ideal": ratio / 2,
                "of_independent_processes": against_independent,
            }
    results["pp2"] |= predicted_pipeline(results["pp2"]["against_one_rank"], given, memory["pp2"])
    return results


def predicted_pipeline(measured: float, given: float, ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Return the speed that the pipeline bubble allows, with equal stages and with the actual stages.

    Args:
        measured: Measured speed, compared with one rank.
        given: Speed of two independent processes, compared with one.
        ranks: Figures of the stages.
    """
    micro_batches = MODEL["global_batch_size"] // MODEL["micro_batch_size"]
    filled = micro_batches / (micro_batches + 1)
    work = [rank["matrix_parameters"] for rank in ranks]
    balance = sum(work) / max(work) / 2
    return {
        "bubble": 1 - filled,
        "predicted_by_bubble": 2 * filled,
        "of_predicted_by_bubble": measured / (2 * filled),
        "predicted_by_bubble_and_stages": 2 * filled * balance,
        "of_predicted_by_bubble_and_stages": measured / (2 * filled * balance),
        "of_predicted_with_independent_processes": measured / (given * filled * balance),
    }


def serve(pipe: Connection, values: dict[str, Any]) -> None:
    """Run one rank: build the engine, measure memory, then take a step whenever asked."""
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


def own_batches(config: Config, mesh: ProcessMesh) -> MicroBatches:
    """Return this rank's micro-batches of a global batch of random tokens that is the same for any mesh."""
    shape = (-1, mesh.data.size, config.training.micro_batch_size, config.model.seq_length + 1)
    samples = np.random.default_rng(0).integers(
        0, VOCABULARY, (config.global_batch_size(mesh.data.size), config.model.seq_length + 1)
    )
    return list(samples.reshape(shape)[:, mesh.data.rank])


def memory_against_plan(config: Config, mesh: ProcessMesh, peak: int) -> dict[str, Any]:
    """Compare the peak memory of this rank with the plan."""
    from megatron_adalrs.engine import computes_on_cpu
    from megatron_adalrs.planning import plan_run

    planned = plan_run(config, VOCABULARY, mesh.shape, computes_on_cpu()).stages[mesh.pipe.rank]
    # Learned positions and input embeddings are looked up, not multiplied.
    table = config.model.max_positions * config.model.hidden_size
    looked_up = table if planned.part.has_embedding else 0
    if planned.part.has_embedding and not planned.part.has_output:
        looked_up += config.model.padded_vocab_size(VOCABULARY, mesh.tensor.size) * config.model.hidden_size
    return {
        "matrix_parameters": planned.part.parameters - looked_up,
        "peak_bytes": peak,
        "planned_bytes": planned.peak,
        "error": planned.peak / peak - 1,
    }
