"""The composition root: from a configuration to a trainer that is ready to run.

Everything that can be refused is refused before the model is built, on all ranks together.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from megatron_adalrs import checkpoint
from megatron_adalrs.adalrs.controller import build_controller
from megatron_adalrs.adalrs.race_state import INITIAL
from megatron_adalrs.checkpoint.train_state import TrainState, count_samples
from megatron_adalrs.config import Config
from megatron_adalrs.config.run import RUN_CONFIG
from megatron_adalrs.data.blend import Blend, Datasets, Part
from megatron_adalrs.data.blend import build_datasets as build_of_data
from megatron_adalrs.data.gpt_dataset import GPTDataset
from megatron_adalrs.data.loader import BatchLoader, SampleDataset
from megatron_adalrs.data.vocabulary import resolve_vocabulary, with_end_of_document
from megatron_adalrs.distributed.collectives import on_every_rank, on_first_rank
from megatron_adalrs.distributed.process_mesh import AXES, ProcessMesh
from megatron_adalrs.engine import (
    build_engine,
    computes_on_cpu,
    end_distributed,
    init_distributed,
    require_supported,
)
from megatron_adalrs.engine.deepspeed_config import deepspeed_settings
from megatron_adalrs.metrics import announce, open_metrics
from megatron_adalrs.metrics.wandb import WandbRun, require_wandb
from megatron_adalrs.model.gpt import count_parameters, flops_per_token
from megatron_adalrs.optim.lr_schedule import build_schedule
from megatron_adalrs.planning import describe, plan_run
from megatron_adalrs.snapshot.host_buffers import require_room
from megatron_adalrs.snapshot.rng_state import seed_everything
from megatron_adalrs.training.evaluation import Evaluation
from megatron_adalrs.training.loss_guard import LossGuard, LossMemory
from megatron_adalrs.training.rollback import RollbackStore
from megatron_adalrs.training.trainer import Trainer
from megatron_adalrs.utils.format import quantity

ORDER_SAMPLES = 65536  # as many samples stand for the whole order

__all__ = ["build_trainer", "end_distributed", "join_ranks"]


def join_ranks(config: Config) -> tuple[ProcessMesh, str]:
    """Meet the other ranks, in a process that has not. Collective.

    Returns:
        This one's place, without groups, and the name of this attempt to run the job.

    Raises:
        ValueError: on every rank, before they meet, with one sentence that names the field.
        RuntimeError: of torch.distributed, when they do not find each other.
    """
    mesh = ProcessMesh.from_environment(**config.parallel.sizes)
    config.micro_batches_per_step(mesh.data.size)
    deepspeed_settings(config, mesh.data.size)
    require_supported(config.training.precision)
    return mesh, init_distributed(mesh, config.run.distributed_timeout_minutes)


def build_trainer(config: Config) -> Trainer:
    """Join the other ranks and build everything. Collective.

    Raises:
        ValueError, OSError: on every rank, with one sentence that names the field or file.
    """
    mesh, _ = join_ranks(config)
    mesh = mesh.with_groups()
    micro_batches = config.micro_batches_per_step(mesh.data.size)
    global_batch_size = config.global_batch_size(mesh.data.size)
    on_first_rank(lambda: require_wandb(config.run.wandb_project))
    config = on_first_rank(lambda: with_run_dir(config))
    resumed = on_first_rank(lambda: checkpoint.checkpoint_to_resume(config.run))
    saved = on_first_rank(lambda: checkpoint.read_state(resumed)) if resumed else None
    source = on_first_rank(lambda: checkpoint.find_initial_weights(config.run, saved))
    config = with_source(config, source)
    vocabulary = on_first_rank(lambda: resolve_vocabulary(config))
    vocab_size, tokenizer = vocabulary.size, vocabulary.tokenizer
    config = on_first_rank(lambda: with_end_of_document(config, vocabulary))
    if resumed and saved:
        checkpoint.require_compatible(resumed, saved, config, mesh)
    progress = checkpoint.restore_entry(resumed, saved, "progress", dict) if resumed and saved else {}
    state = TrainState(**progress)
    skipped_samples = count_samples(state.skipped_samples)
    on_first_rank(lambda: build_datasets(config, global_batch_size, skipped_samples) and None)
    datasets = on_every_rank(lambda: build_datasets(config, global_batch_size, skipped_samples))
    blend = datasets.train

    def identity(consumed_samples: int) -> dict[str, Any]:
        """What a run must share with a checkpoint beyond its configuration."""
        data_order = blend.order_digest(min(consumed_samples, ORDER_SAMPLES))
        return {
            "vocab_size": vocab_size,
            "tokenizer_sha256": tokenizer.sha256 if tokenizer else None,
            "blend": blend.shares,
            "data_order": data_order,
        }

    data_order = blend.order_digest(min(config.training.train_iters * global_batch_size, ORDER_SAMPLES))
    loss_guard = LossGuard(
        config.loss_guard, config.training.train_iters, config.training.precision == "fp16"
    )
    controller = build_controller(
        config.adalrs, config.training.train_iters, config.optimizer.lr_warmup_iters
    )
    if saved:
        ours = identity(state.consumed_samples)
        checkpoint.restore_entry(
            resumed, saved, "identity", lambda _: checkpoint.require_same_data(resumed, saved, ours)
        )
        checkpoint.restore_entry(resumed, saved, "controller", controller.load_state_dict)
        checkpoint.restore_entry(resumed, saved, "loss_guard", loss_guard.load_state_dict)
    # A search under way may still go back to the weights that the run began with.
    weights = weights_step = None
    if source and (not resumed or controller.needs_initial):
        weights, weights_step = on_every_rank(
            lambda: checkpoint.open_initial_weights(source, config.model, vocab_size, tokenizer)
        )
    plan = plan_run(config, vocab_size, mesh.shape, computes_on_cpu())
    snapshot_bytes = plan.stages[mesh.pipe.rank].snapshot
    directory = config.adalrs.snapshot_dir if config.live_snapshots else None
    if directory:
        on_every_rank(lambda: require_room(directory, snapshot_bytes, ranks_on_this_host()))
    on_first_rank(lambda: write_config(config))

    parameters = count_parameters(config.model, vocab_size)
    origin = checkpoint.describe_resume(resumed, saved, config, mesh) if resumed and saved else None
    if source and not resumed:
        origin = f"weights of {source}" + ("" if weights_step is None else f", step {weights_step}")
    data_lines = about_the_data(config, blend, global_batch_size)
    announce(
        f"{opening(config, mesh, parameters, snapshot_bytes, data_lines, origin)}\n{describe(plan)}",
        mesh.is_first,
    )
    seed_everything(config.training.seed, mesh.tensor_group)
    engine = build_engine(config, vocab_size, mesh, weights)
    rollback = RollbackStore(engine, directory)
    if resumed:
        if controller.needs_initial:
            # The engine still is what it was before the first step of the run that goes on.
            rollback.capture(INITIAL, TrainState(), LossMemory())
        checkpoint.resume(engine, mesh, resumed, saved, config)

    def loader(dataset: SampleDataset) -> BatchLoader:
        return BatchLoader(
            dataset, config.training.micro_batch_size, mesh.data.rank, mesh.data.size, micro_batches
        )

    def evaluation(part: Part) -> Evaluation:
        batches = batches_in_one_pass(part.dataset, config.run.eval_iters, global_batch_size)
        return Evaluation(part.dataset.split, loader(part.dataset), batches, part.name, float(part.share))

    metrics = open_metrics(
        config.run.run_dir,
        config.run.tensorboard_dir,
        config.training.train_iters,
        config.run.log_interval,
        state.step,
        mesh.is_first,
        config.adalrs.budget if config.adalrs.enabled else "kept",
        wandb_run(config),
    )
    metrics.write(
        "run",
        {
            "event": "resume" if resumed else "start",
            "step": state.step,
            "total_steps": state.total_steps,
            "parameters": parameters,
            "world_size": mesh.world_size,
            "vocab_size": vocab_size,
            "data_order": data_order,
            "snapshot_bytes": snapshot_bytes,
            "weights_from": str(source) if source else None,
            "weights_step": weights_step,
        },
    )
    return Trainer(
        config=config,
        mesh=mesh,
        engine=engine,
        batches=loader(blend),
        blend=blend,
        evaluations=[
            [evaluation(part) for part in parts] for parts in (datasets.valid, datasets.test) if parts
        ],
        schedule=build_schedule(config),
        controller=controller,
        loss_guard=loss_guard,
        rollback=rollback,
        metrics=metrics,
        state=state,
        identity=identity,
        flops_per_token=flops_per_token(config.model, parameters, config.model.padded_vocab_size(vocab_size)),
    )


def with_source(config: Config, source: Path | None) -> Config:
    """The configuration with the very checkpoint that its weights come from: a folder may get newer ones."""
    return config.model_copy(update={"run": config.run.model_copy(update={"finetune_from": source})})


def ranks_on_this_host() -> int:
    """As torchrun or DeepSpeed's launcher tell."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def with_run_dir(config: Config) -> Config:
    """The configuration with every path of the run filled in. Its directory is made once nothing is refused
    any more.

    Raises:
        ValueError: the directory cannot be written, or holds another run.
    """
    run = config.run
    run_dir = run.run_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    new = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK):
            raise PermissionError("permission denied")
        (run_dir / ".writable").touch()
        (run_dir / ".writable").unlink()
        for folder in new:
            with suppress(OSError):  # another run's directory is in it by now
                folder.rmdir()
    except OSError as error:
        raise ValueError(f"run_dir: cannot write to {run_dir}: {error.strerror or error}") from None
    if (run_dir / "metrics.jsonl").exists() and run.load is None and not run.auto_resume:
        raise ValueError(
            f"run_dir: {run_dir} already holds a run; choose another directory, or resume it with --load "
            f"{run_dir}"
        )
    paths = {
        "run_dir": run_dir,
        "save": run.save or run_dir / "checkpoints",
        "tensorboard_dir": run.tensorboard_dir or run_dir / "tensorboard",
    }
    return config.model_copy(update={"run": run.model_copy(update=paths)})


def build_datasets(config: Config, global_batch_size: int, skipped_samples: int = 0) -> Datasets:
    """The data sets of a run; the first process to ask builds the indices, the others open them.

    There are as many samples to train on as may be, or were, passed over for bad numbers beyond those needed:
    no order changes by it.
    """
    train_iters = config.training.train_iters
    spare = max(config.loss_guard.max_skipped_batches(train_iters) * global_batch_size, skipped_samples)
    return build_of_data(
        config.data,
        config.model.seq_length,
        train_samples=train_iters * global_batch_size + spare,
        evaluated_samples=config.run.eval_iters * global_batch_size,
        seed=config.training.seed,
    )


def batches_in_one_pass(dataset: GPTDataset, limit: int, global_batch_size: int) -> int:
    """Global batches in one pass over the dataset, at most `limit`, at least one."""
    samples = (dataset.num_tokens - 1) // dataset.seq_length
    return max(1, min(limit, samples // global_batch_size))


def write_config(config: Config) -> None:
    """The effective configuration, ready to be passed back as --config."""
    config.run.run_dir.mkdir(parents=True, exist_ok=True)
    path = config.run.run_dir / RUN_CONFIG
    temporary = path.with_suffix(".yaml.incomplete")
    temporary.write_text(yaml.safe_dump(config.to_flat(), sort_keys=False), encoding="utf-8")
    os.replace(temporary, path)


def wandb_run(config: Config) -> WandbRun | None:
    """Weights & Biases, where it is asked for."""
    run = config.run
    if run.wandb_project is None:
        return None
    return WandbRun(run.wandb_project, run.wandb_exp_name or run.run_dir.name, run.run_dir, config.to_flat())


def opening(
    config: Config,
    mesh: ProcessMesh,
    parameters: int,
    snapshot_bytes: int,
    data: str,
    origin: str | None,
) -> str:
    """What a person reads before the first step. `origin`: what the run begins with, unless with weights
    drawn. `data`: about its data."""
    training = config.training
    tokens = config.global_batch_size(mesh.data.size) * config.model.seq_length
    axes = [f"{getattr(mesh.shape, name)} {name}" for name in AXES if getattr(mesh.shape, name) > 1]
    sequence = " with sequence parallelism" if config.parallel.sequence_parallel else ""
    shape = f" = {' x '.join(axes)}{sequence}" if len(axes) > 1 or mesh.data.size != mesh.world_size else ""
    counted = ", discarded ones included" if config.adalrs.enabled and config.adalrs.budget == "total" else ""
    lines = [
        f"run directory {config.run.run_dir}",
        f"{quantity(parameters, 'parameters')}, {mesh.world_size} rank(s){shape}, "
        f"ZeRO-{training.zero_stage}, "
        f"{training.precision}; {training.train_iters} steps of {tokens} tokens{counted}",
        data,
    ]
    if origin:
        lines.append(origin)
    if config.adalrs.enabled:
        lines.append(about_the_search(config))
    if config.live_snapshots:
        held = (
            "a snapshot takes"
            if config.live_snapshots == 1
            else f"up to {config.live_snapshots} snapshots take"
        )
        where = f" of {config.adalrs.snapshot_dir}" if config.adalrs.snapshot_dir else ""
        lines.append(f"{held} {quantity(snapshot_bytes, 'B')}{where} on each rank")
    return "\n".join(lines)


def about_the_data(config: Config, blend: Blend, global_batch_size: int) -> str:
    """Its order, and what a whole run takes of each corpus of a blend."""
    samples = config.training.train_iters * global_batch_size
    lines = [f"data order {blend.order_digest(min(samples, ORDER_SAMPLES))}"]
    if len(blend.parts) > 1:
        lines += [
            f"{use.name}: {float(part.share):.3%} of the samples, in all {quantity(use.tokens, 'token')}, "
            f"{use.epochs:.3g} epochs"
            for part, use in zip(blend.parts, blend.used(samples), strict=True)
        ]
    return "\n".join(lines)


def about_the_search(config: Config) -> str:
    """Where it begins and ends, and what it may cost in steps."""
    train_iters = config.training.train_iters
    plan = config.adalrs.resolve(train_iters, config.optimizer.lr_warmup_iters)
    limit = config.adalrs.discarded_limit
    budget = f"; never more than {int(limit * train_iters)} in all" if math.isfinite(limit) else ""
    return f"AdaLRS {plan}{budget}"
