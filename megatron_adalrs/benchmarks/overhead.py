"""Benchmark of AdaLRS against a fixed learning rate, with one and two data-parallel ranks and ZeRO 0 to 3.

The same ranks take turns with steps at a fixed rate, in paper mode and in robust mode, and then with
captures, restores, plain copies of the same size, and steps. The order changes from turn to turn. The slowest
rank's time counts. A result is the median of the ratios of all turns, with its standard error if it is near
zero.

The cost of the snapshots of a whole search is that of the search with the most snapshots: with default
settings, if every trial fails, in a run of `RUN_STEPS` steps. Windows and races are shares of a run, so that
their number hardly depends on its length, and their share of the cost is halved if a run is twice as long.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil

from megatron_adalrs.adalrs.controller import Controller, FixedRate, build_controller
from megatron_adalrs.adalrs.settings import AdaLRSSettings
from megatron_adalrs.benchmarks.timing import median_and_error, take_turns
from megatron_adalrs.distributed.local_ranks import THREADS_PER_RANK, LocalRanks

if TYPE_CHECKING:
    from megatron_adalrs.training.trainer import Trainer

VOCABULARY = 512
Mode = Literal["paper", "robust"]
MODES: tuple[Mode, ...] = ("paper", "robust")
RANKS = (1, 2)
STAGES = (0, 1, 2, 3)
RUN_STEPS = 10_000


def measure_overhead(shape: dict[str, Any], pairs: int, folder: Path) -> dict[str, Any]:
    """Measure the overhead, the snapshots and the memory of every combination of ranks and ZeRO stage.

    Args:
        shape: Configuration of the model and its micro-batch. A step has two micro-batches, which the ranks
            share.
        pairs: Number of turns for snapshots; steps have three times as many.
        folder: Folder for data and runs.
    """
    write_random_tokens(folder / "random", VOCABULARY, 64 * shape["seq_length"] * shape["micro_batch_size"])
    values = shape | {
        "vocab_size": VOCABULARY,
        "data_path": str(folder / "random"),
        "split": "1,0,0",
        "lr": 1e-4,
        "train_iters": 200 * (pairs + 5),
        "global_batch_size": 2 * shape["micro_batch_size"],
        "log_interval": 10**9,
    }
    searches = {mode: whole_search(mode) for mode in MODES}
    results: dict[str, Any] = {
        "model": values,
        "threads_of_a_rank": THREADS_PER_RANK,
        "turns": pairs,
        "run_steps": RUN_STEPS,
    }
    for ranks in RANKS:
        for stage in STAGES:
            name = f"dp{ranks}_zero{stage}"
            changes = {"zero_stage": stage, "run_dir": str(folder / name)}
            processes = LocalRanks(ranks, serve, values | changes, pairs)
            try:
                results[name] = compare(processes.ask("measure"), searches)
            finally:
                processes.close()
    return results


def write_random_tokens(prefix: Path, vocabulary: int, count: int) -> None:
    """Write a data set of 16 documents of random tokens."""
    from megatron_adalrs.data.indexed_dataset_builder import IndexedDatasetBuilder

    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for document in np.array_split(np.random.default_rng(0).integers(0, vocabulary, count), 16):
            builder.add_document(document)
        builder.finalize()


def serve(pipe: Connection, values: dict[str, Any], pairs: int) -> None:
    """Run one rank: measure once asked, then wait until the other ranks have finished."""
    from megatron_adalrs.cli.arguments import config_from_values
    from megatron_adalrs.engine import end_distributed
    from megatron_adalrs.training.build import build_trainer

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer = build_trainer(config_from_values(values))
        pipe.recv()
        pipe.send(measure_rank(trainer, pairs))
        with contextlib.suppress(EOFError):
            pipe.recv()
        trainer.close("end", "")
        end_distributed()


def measure_rank(trainer: Trainer, pairs: int) -> dict[str, Any]:
    """Return this rank's seconds by turn, and the bytes of a snapshot: held, estimated, and memory growth."""
    import torch

    from megatron_adalrs.snapshot.engine_snapshot import EngineSnapshot, estimate_snapshot_bytes

    engine = trainer.engine
    train_iters = trainer.config.training.train_iters
    controllers: dict[str, Controller] = {"fixed": FixedRate()}
    controllers |= {mode: idle_search(mode, train_iters) for mode in MODES}
    phases = {name: controller.phase for name, controller in controllers.items()}

    def step_with(controller: Controller) -> Callable[[], None]:
        def step() -> None:
            trainer.controller = controller
            trainer.step()

        return step

    steps = take_turns({name: step_with(controller) for name, controller in controllers.items()}, 3 * pairs)
    if phases != {name: controller.phase for name, controller in controllers.items()}:
        raise RuntimeError("a search took a decision during the measurement")
    fixed = step_with(controllers["fixed"])
    snapshot = EngineSnapshot(engine)
    before = resident_bytes()
    snapshot.capture()
    grown = resident_bytes() - before
    source, target = (torch.ones(snapshot.nbytes, dtype=torch.uint8) for _ in range(2))
    sides = {
        "capture": snapshot.capture,
        "restore": snapshot.restore,
        "copy": lambda: target.copy_(source),
        "step": fixed,
    }
    snapshots = take_turns(sides, pairs)
    estimate = estimate_snapshot_bytes(
        trainer.config.training, engine.parameters_held, trainer.mesh.replica.size
    )
    return {
        "steps": steps,
        "snapshots": snapshots,
        "bytes": snapshot.nbytes,
        "estimate": estimate,
        "grown": grown,
    }


def resident_bytes() -> int:
    """Return freed memory to the system, which could hide a snapshot, and return the resident memory."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim:
        trim(0)
    return psutil.Process().memory_info().rss


def idle_search(mode: Mode, train_iters: int) -> Controller:
    """Return a search that observes every step and decides nothing for a twentieth of the run."""
    span = train_iters // 20
    spans: dict[str, Any] = {"window": span} if mode == "paper" else {"climb": False, "trial_steps": span}
    settings = AdaLRSSettings(mode=mode, search_start=0.11, search_end=1.0, **spans)
    controller = build_controller(settings, train_iters, 0)
    while controller.phase == "before":
        controller.observe(9.0)
    return controller


def whole_search(mode: Mode) -> dict[str, Any]:
    """Simulate a search with default settings in which every trial fails.

    Returns:
        Numbers of captures, restores, discarded steps and snapshots held at once, and mean seconds of a
        decision by phase.
    """
    settings = AdaLRSSettings(mode=mode)
    controller = build_controller(settings, RUN_STEPS, 0)
    steps = np.arange(RUN_STEPS + 1)
    losses = 3 + 6 / np.sqrt(1 + steps / 200) + np.random.default_rng(0).normal(0, 0.02, len(steps))
    decisions, observed = [controller.resume()], defaultdict(list)
    while controller.step < RUN_STEPS:
        phase = controller.phase
        worse = {"trial": 0.01, "restart": 0.5}.get(phase, 0.0)
        loss = float(losses[controller.step]) + worse
        started = time.perf_counter()
        decisions.append(controller.observe(loss))
        observed[phase].append(time.perf_counter() - started)
    return {
        "captures": sum(decision.capture is not None for decision in decisions),
        "restores": sum(decision.restore is not None for decision in decisions),
        "discarded_steps": sum(decision.discarded_steps for decision in decisions),
        "snapshots_at_once": settings.resolve(RUN_STEPS, 0).live_snapshots,
        "decision_seconds": {phase: statistics.fmean(seconds) for phase, seconds in observed.items()},
    }


def compare(ranks: list[dict[str, Any]], searches: dict[Mode, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one combination from the measurements of its ranks."""
    steps, snapshots = (
        {name: np.max([rank[kind][name] for rank in ranks], axis=0) for name in ranks[0][kind]}
        for kind in ("steps", "snapshots")
    )
    seconds = {name: float(np.median(taken)) for name, taken in snapshots.items()}
    step = float(np.median(steps["fixed"]))
    results: dict[str, Any] = {"step_seconds_fixed_rate": step}
    for mode in MODES:
        overhead, error = median_and_error(steps[mode] / steps["fixed"] - 1)
        decision = max(searches[mode]["decision_seconds"].values()) / step
        results |= {
            f"overhead_{mode}": overhead,
            f"overhead_{mode}_error": error,
            f"decision_{mode}": decision,
        }
    for name in ("capture", "restore"):
        results[f"{name}_seconds"] = seconds[name]
        for other in ("step", "copy"):
            results[f"{name}_against_{other}"] = float(np.median(snapshots[name] / snapshots[other]))
    results["copy_seconds"] = seconds["copy"]
    results["ranks"] = [
        {
            "bytes": rank["bytes"],
            "bytes_estimated_before_the_run": rank["estimate"],
            "estimate_error": rank["estimate"] / rank["bytes"] - 1,
            "memory_grown_by_bytes": rank["grown"],
        }
        for rank in ranks
    ]
    results["searches"] = {}
    for mode, search in searches.items():
        spent = search["captures"] * seconds["capture"] + search["restores"] * seconds["restore"]
        run = (RUN_STEPS + search["discarded_steps"]) * step
        most = search["snapshots_at_once"] * max(rank["bytes"] for rank in ranks)
        results["searches"][mode] = search | {
            "snapshots_in_steps": spent / step,
            "snapshots_of_run": spent / run,
            "most_bytes_of_a_rank": most,
        }
    return results


def table(results: dict[str, Any]) -> str:
    """Return the figures as a table."""
    lines = [
        f"{'':11}{'fixed step':>11}{'watching':>18}{'recording':>18}{'capture':>9}{'restore':>9}"
        f"{'bytes (grown)':>16}{'a search, paper':>17}{'robust':>8}",
        f"{'':11}{'ms':>11}{'paper, % more':>18}{'robust, % more':>18}{'/ copy':>9}{'/ copy':>9}"
        f"{'/ estimate':>16}{'% of the run':>17}{'':>8}",
    ]
    for name, cell in results.items():
        if not name.startswith("dp"):
            continue
        more = [f"{cell[f'overhead_{mode}']:.2%} ± {cell[f'overhead_{mode}_error']:.2%}" for mode in MODES]
        estimate, held, grown = (
            sum(rank[name] for rank in cell["ranks"])
            for name in ("bytes_estimated_before_the_run", "bytes", "memory_grown_by_bytes")
        )
        fit = f"{held / estimate:.4f} ({grown / estimate:.2f})"
        shares = [cell["searches"][mode]["snapshots_of_run"] for mode in MODES]
        lines.append(
            f"{name:11}{1000 * cell['step_seconds_fixed_rate']:11.1f}{more[0]:>18}{more[1]:>18}"
            f"{cell['capture_against_copy']:9.2f}{cell['restore_against_copy']:9.2f}{fit:>16}"
            f"{shares[0]:17.3%}{shares[1]:8.3%}"
        )
    return "\n".join(lines)
