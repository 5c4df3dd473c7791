"""Messages at the start and at the end of a run."""

from __future__ import annotations

import os
import shlex
import sys

from megatron_adalrs import checkpoint
from megatron_adalrs.checkpoint.train_state import TrainState, count_samples
from megatron_adalrs.config import Config
from megatron_adalrs.distributed.process_mesh import AXES
from megatron_adalrs.training.data import TrainingData
from megatron_adalrs.training.resolve import ResolvedRun
from megatron_adalrs.utils.format import quantity


def opening(run: ResolvedRun, data: TrainingData, snapshot_bytes: int, weights_step: int | None) -> str:
    """Return the description of a run that is printed before its first step.

    Args:
        snapshot_bytes: Size of all snapshots that a rank holds at a time.
        weights_step: Step of the checkpoint that the initial weights come from, if it is known.
    """
    lines = [f"run directory {run.directory.folders.run_dir}", _describe_size(run), *_describe_data(data)]
    if origin := _describe_origin(run, weights_step):
        lines.append(origin)
    if run.config.adalrs.is_on:
        lines.append(_describe_search(run.config))
    if run.config.live_snapshots:
        lines.append(_describe_snapshots(run.config, snapshot_bytes))
    return "\n".join(lines)


def summary(run: ResolvedRun, state: TrainState, scale: float, saved: bool) -> str:
    """Return the result of a run: its steps, and the effect and cost of the loss guard and of the search.

    Args:
        scale: Factor on the learning rate at the end.
        saved: Whether the final checkpoint was written.
    """
    config, global_batch_size = run.config, run.global_batch_size
    folder = run.directory.folders.save
    where = f"checkpoint in {folder}" if saved else "the final checkpoint could not be written"
    lines = [f"done: {state.step} steps, {where}"]
    if state.skipped_samples:
        batches = count_samples(state.skipped_samples) // global_batch_size
        lines.append(f"loss guard: {state.guard_undone_steps} steps undone, {batches} batches skipped")
    if config.adalrs.is_on:
        lr = config.optimizer.lr
        tokens = global_batch_size * config.model.seq_length
        discarded = state.discarded_steps - state.guard_undone_steps
        cost = quantity(discarded * tokens, "token")
        kept = quantity(state.step * tokens, "token")
        effect = f"changed the base learning rate from {lr:g} to {lr * scale:.4g} (x {scale:.4g})"
        lines += [
            f"AdaLRS {effect if scale != 1 else f'ended at the given base learning rate of {lr:g}'}",
            f"cost of the search: {discarded} discarded steps ({discarded / state.total_steps:.1%} of all; "
            f"{cost} in addition to {kept} kept) and {state.snapshot_seconds:.1f} s for snapshots",
        ]
    return "\n".join(lines)


def command_to_continue(run: ResolvedRun) -> str:
    """Return the command that continues an interrupted run from its latest checkpoint."""
    if run.mesh.world_size == 1:
        program = ["megatron-adalrs", "pretrain"]
    else:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 0)
        on_one_host = ["--num_accelerators", str(ranks)] if ranks == run.mesh.world_size else []
        script = sys.argv[0] if sys.argv[0].endswith(".py") else "pretrain_gpt.py"
        program = ["deepspeed", *on_one_host, script]
    return shlex.join([*program, "--load", str(run.directory.folders.run_dir)])


def _describe_size(run: ResolvedRun) -> str:
    """Describe the size of the model, of the mesh and of the training."""
    config = run.config
    mesh = run.mesh
    axes = [f"{getattr(mesh.shape, name)} {name}" for name in AXES if getattr(mesh.shape, name) > 1]
    sequence = " with sequence parallelism" if config.parallel.sequence_parallel else ""
    has_model_axes = len(axes) > 1 or mesh.data.size != mesh.world_size
    shape = f" = {' x '.join(axes)}{sequence}" if has_model_axes else ""
    is_total = config.adalrs.is_on and config.adalrs.budget == "total"
    counted = ", including discarded steps" if is_total else ""
    tokens = run.global_batch_size * config.model.seq_length
    return (
        f"{quantity(run.parameters, 'parameters')}, {mesh.world_size} rank(s){shape}, "
        f"ZeRO-{config.training.zero_stage}, {config.training.precision}; "
        f"{config.training.train_iters} steps of {tokens} tokens{counted}"
    )


def _describe_data(data: TrainingData) -> list[str]:
    """Describe the order of the data and what a complete run uses of each corpus of a blend."""
    lines = [f"data order {data.order}"]
    blend = data.blend
    if len(blend.parts) > 1:
        lines += [
            f"{use.name}: {float(part.share):.3%} of the samples, {quantity(use.tokens, 'token')} in total, "
            f"{use.epochs:.3g} epochs"
            for part, use in zip(blend.parts, blend.used(data.run.train_samples), strict=True)
        ]
    return lines


def _describe_origin(run: ResolvedRun, weights_step: int | None) -> str | None:
    """Describe what the run begins from; None if its weights are drawn at random."""
    if run.resumed:
        described = checkpoint.describe_resume(run.resumed.path, run.resumed.state, run.config, run.mesh)
        note = run.directory.start.note
        return f"{described}\n{note}" if note else described
    if run.weights_from is None:
        return None
    step = "" if weights_step is None else f", step {weights_step}"
    return f"weights of {run.weights_from}{step}"


def _describe_search(config: Config) -> str:
    """Describe the steps between which AdaLRS searches, and how many steps the search may discard."""
    train_iters = config.training.train_iters
    plan = config.adalrs.resolve(train_iters, config.optimizer.lr_warmup_iters)
    return f"AdaLRS {config.adalrs.describe(plan)}"


def _describe_snapshots(config: Config, snapshot_bytes: int) -> str:
    count = config.live_snapshots
    subject = "a snapshot takes" if count == 1 else f"up to {count} snapshots take"
    where = f" of {config.adalrs.snapshot_dir}" if config.adalrs.snapshot_dir else ""
    return f"{subject} {quantity(snapshot_bytes, 'B')}{where} on each rank"
