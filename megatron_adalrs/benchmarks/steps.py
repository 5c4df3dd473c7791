"""Benchmark of one rank in this process: steps, snapshots and saves, compared with hand-written code.

The two sides of a comparison take turns; see `timing.paired`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megatron_adalrs.adalrs.controller import Controller, FixedRate, build_controller
from megatron_adalrs.benchmarks.options import SHAPE, Arguments
from megatron_adalrs.benchmarks.overhead import write_random_tokens
from megatron_adalrs.benchmarks.timing import paired
from megatron_adalrs.checkpoint import CheckpointFolder, PendingSave
from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.engine import end_distributed
from megatron_adalrs.model.gpt import GPT, count_parameters
from megatron_adalrs.model.initialization import init_weights
from megatron_adalrs.optim.optimizer import build_optimizer
from megatron_adalrs.snapshot.engine_snapshot import EngineSnapshot, estimate_snapshot_bytes
from megatron_adalrs.training.build import build_trainer
from megatron_adalrs.training.trainer import Trainer

VOCABULARY = 8192


def measure_steps(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Run the benchmark that `arguments.what` names, or all."""
    torch.set_num_threads(arguments.threads)
    measures: dict[str, Callable[[Arguments, Trainer], dict[str, Any]]] = {
        "step": measure_step,
        "watching": measure_watching,
        "snapshot": measure_snapshot,
        "saving": measure_saving,
    }
    results: dict[str, Any] = {"model": vars(arguments), "torch": torch.__version__}
    trainer = build(arguments, folder)
    for name, measure in measures.items():
        if arguments.what in ("all", name):
            results[name] = measure(arguments, trainer)
    trainer.close("end", "")
    end_distributed()
    return results


def build(arguments: Arguments, folder: Path) -> Trainer:
    """Build a trainer on random tokens whose search observes the whole run without starting a trial."""
    train_iters = 20 * (arguments.pairs + 100)
    write_random_tokens(folder / "random", VOCABULARY, 4 * arguments.seq_length * arguments.micro_batch_size)
    config = config_from_values(
        {name: getattr(arguments, name) for name in SHAPE}
        | {
            "zero_stage": arguments.zero_stage,
            "vocab_size": VOCABULARY,
            "data_path": str(folder / "random"),
            "split": "1,0,0",
            "train_iters": train_iters,
            "lr": 1e-3,
            "run_dir": folder / "run",
            "log_interval": 1_000_000,
            "adalrs": {
                "mode": "paper",
                "search_start": 0.9,
                "search_end": 1.0,
                "window": round(0.05 * train_iters),
            },
        }
    )
    return build_trainer(config)


def measure_step(arguments: Arguments, trainer: Trainer) -> dict[str, Any]:
    """Compare training steps with those of a hand-written PyTorch loop on the same model and batches."""
    config = trainer.config
    model = GPT(config.model, VOCABULARY)
    init_weights(model, config.model, config.training.seed)
    optimizer = build_optimizer(model, config.optimizer)

    def plain_step(fused_loss: bool = False) -> None:
        batch = torch.from_numpy(trainer.batches.micro_batches(trainer.state.consumed_samples)[0])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=arguments.bf16):
            if fused_loss:
                loss = model(batch)
            else:
                logits = model.logits(batch[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        loss.item()

    ours, plain, ratio = paired(trainer.step, plain_step, arguments.pairs)
    _, _, ratio_fused = paired(trainer.step, lambda: plain_step(fused_loss=True), arguments.pairs)
    tokens = arguments.micro_batch_size * arguments.seq_length
    return {
        "tokens_per_second": tokens / ours,
        "tokens_per_second_plain_loop": tokens / plain,
        "speed_against_plain_loop": 1 / ratio,
        "speed_against_plain_loop_with_our_loss": 1 / ratio_fused,
    }


def measure_watching(arguments: Arguments, trainer: Trainer) -> dict[str, Any]:
    """Compare steps that AdaLRS observes with steps at a fixed rate in the same engine."""
    watching, fixed = trainer.controller, FixedRate()

    def step_with(controller: Controller) -> None:
        trainer.controller = controller
        trainer.step()

    while watching.phase != "watch":
        watching.observe(9.0)
    with_search, without, ratio = paired(
        lambda: step_with(watching), lambda: step_with(fixed), 3 * arguments.pairs
    )
    if watching.phase != "watch":
        raise RuntimeError("the search took a decision during the measurement: raise --pairs")
    calls = 10_000
    watched = build_controller(trainer.config.adalrs, 100 * calls)
    started = time.perf_counter()
    for _ in range(calls):
        watched.observe(9.0)
    trainer.controller = fixed
    return {
        "step_seconds": with_search,
        "step_seconds_fixed_rate": without,
        "overhead_paired": ratio - 1,
        "overhead_of_the_decision_itself": (time.perf_counter() - started) / calls / without,
    }


def measure_snapshot(arguments: Arguments, trainer: Trainer) -> dict[str, Any]:
    """Compare capture and restore with one copy of the same size between two flat buffers."""
    trainer.step()
    snapshot = EngineSnapshot(trainer.engine)
    snapshot.capture()
    source, target = (torch.ones(snapshot.nbytes, dtype=torch.uint8) for _ in range(2))
    capture, copy, capture_ratio = paired(snapshot.capture, lambda: target.copy_(source), arguments.pairs)
    restore, _, restore_ratio = paired(snapshot.restore, lambda: target.copy_(source), arguments.pairs)
    config = trainer.config
    parameters = count_parameters(config.model, VOCABULARY)
    estimate = estimate_snapshot_bytes(config.training, parameters, trainer.mesh.replica.size)
    return {
        "bytes": snapshot.nbytes,
        "bytes_estimated_before_the_run": estimate,
        "estimate_error": estimate / snapshot.nbytes - 1,
        "capture_seconds": capture,
        "restore_seconds": restore,
        "copy_seconds": copy,
        "capture_against_copy": capture_ratio,
        "restore_against_copy": restore_ratio,
    }


def measure_saving(arguments: Arguments, trainer: Trainer) -> dict[str, Any]:
    """Compare how long --async-save blocks training with one copy of the same size between flat buffers."""
    trainer.step()
    places = CheckpointFolder(trainer.run.directory.folders.run_dir / "saving", keep_last=1)
    files = trainer.engine.files
    steps = count()

    def begin() -> PendingSave:
        return PendingSave(trainer.engine, trainer.mesh, places, next(steps), {}, in_background=True)

    begin().publish()  # the first save allocates the buffers
    source, target = (torch.ones(files.copied_bytes, dtype=torch.uint8) for _ in range(2))
    seconds = np.empty((max(3, arguments.pairs // 6), 2))
    for pair in seconds:
        started = time.perf_counter()
        saving = begin()
        pair[0] = time.perf_counter() - started
        saving.publish()
        started = time.perf_counter()
        target.copy_(source)
        pair[1] = time.perf_counter() - started
    stall, copy = np.median(seconds, axis=0).tolist()
    return {
        "bytes": files.copied_bytes,
        "stall_seconds": stall,
        "copy_seconds": copy,
        "stall_against_copy": float(np.median(seconds[:, 0] / seconds[:, 1])),
    }
