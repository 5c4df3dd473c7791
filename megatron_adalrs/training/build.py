"""Build a trainer from a configuration: `build_trainer`.

Every check that can fail is made before the model is built, and fails on all ranks together.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from megatron_adalrs import checkpoint, engine
from megatron_adalrs.adalrs.controller import Controller, build_controller
from megatron_adalrs.adalrs.robust import INITIAL
from megatron_adalrs.checkpoint.train_state import TrainState
from megatron_adalrs.config import Config
from megatron_adalrs.distributed.collectives import on_every_rank, on_first_rank
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine import Engine
from megatron_adalrs.metrics import Metrics, announce, open_metrics
from megatron_adalrs.metrics.wandb import WandbRun
from megatron_adalrs.model.initialization import WeightSource
from megatron_adalrs.optim.lr_schedule import build_schedule
from megatron_adalrs.planning import describe, plan_run
from megatron_adalrs.snapshot.host_buffers import require_disk_space
from megatron_adalrs.snapshot.rng_state import seed_everything
from megatron_adalrs.training.data import TrainingData, build_data
from megatron_adalrs.training.loss_guard import LossStatistics, StepGuard, build_loss_guard
from megatron_adalrs.training.resolve import ResolvedRun, join_ranks, resolve_config, restore_progress
from megatron_adalrs.training.rollback import RollbackStore
from megatron_adalrs.training.run_directory import SharedRunDirectory
from megatron_adalrs.training.run_messages import opening
from megatron_adalrs.training.trainer import Trainer


class Policies(NamedTuple):
    """The controller of the learning rate and the guard against unusable losses."""

    controller: Controller
    loss_guard: StepGuard


class InitialWeights(NamedTuple):
    """Weights that a run begins with; `source` is None if they are drawn at random."""

    source: WeightSource | None = None
    step: int | None = None
    """Step of the checkpoint that they come from, if it is known."""


def build_trainer(config: Config) -> Trainer:
    """Join the other ranks and build everything that a run needs. Collective.

    Raises:
        ValueError, OSError: The run cannot begin; raised on every rank, naming the field or file.
    """
    mesh, _ = join_ranks(config)
    directory = SharedRunDirectory(config)
    try:
        return _build_in(directory, config, mesh.with_groups())
    except BaseException:
        directory.withdraw()
        raise


def _build_in(directory: SharedRunDirectory, config: Config, mesh: ProcessMesh) -> Trainer:
    run = resolve_config(config, mesh, directory)
    state = restore_progress(run)
    data = build_data(run, state)
    policies = restore_policies(run, data, state)
    weights = open_initial_weights(run, policies.controller)
    snapshot_bytes = prepare(run, data, weights)
    built = build_engine(run, weights)
    rollback = restore_engine(run, built, policies.controller)
    return Trainer(
        run=run,
        data=data,
        engine=built,
        schedule=build_schedule(run.config),
        controller=policies.controller,
        loss_guard=policies.loss_guard,
        rollback=rollback,
        metrics=begin_run(run, data, state, snapshot_bytes, weights),
        state=state,
    )


def restore_policies(run: ResolvedRun, data: TrainingData, state: TrainState) -> Policies:
    """Build the controller and the loss guard, in the state of the resumed checkpoint.

    Raises:
        ValueError: The checkpoint is of other data, or of a run with other settings.
    """
    config = run.config
    train_iters = config.training.train_iters
    loss_guard = build_loss_guard(config)
    controller = build_controller(config.adalrs, train_iters, config.optimizer.lr_warmup_iters)
    if resumed := run.resumed:
        identity = data.identity(state.consumed_samples)
        resumed.restore(
            "identity", lambda _: checkpoint.require_same_data(resumed.path, resumed.state, identity)
        )
        resumed.restore("controller", controller.load_state_dict)
        if "lr" in checkpoint.changes_since(resumed.state, config, run.mesh):
            controller.reset_scale()
        resumed.restore("loss_guard", loss_guard.load_state_dict)
    return Policies(controller, loss_guard)


def open_initial_weights(run: ResolvedRun, controller: Controller) -> InitialWeights:
    """Open the checkpoint of `--finetune-from`, where its weights are needed. Collective.

    A resumed run needs them if its search may still go back to the weights before the first step.
    """
    source = run.weights_from
    if source is None or (run.resumed and not controller.needs_initial):
        return InitialWeights()
    return InitialWeights(
        *on_every_rank(
            lambda: checkpoint.open_initial_weights(source, run.config.model, run.vocab_size, run.tokenizer)
        )
    )


def prepare(run: ResolvedRun, data: TrainingData, weights: InitialWeights) -> int:
    """Check the space for snapshots and print the plan of the run. Collective.

    Returns:
        Bytes of all snapshots that this rank holds at a time.
    """
    plan = plan_run(run.config, run.vocab_size, run.mesh.shape, engine.computes_on_cpu())
    snapshot_bytes = plan.stages[run.mesh.pipe.rank].snapshot
    if directory := snapshot_dir(run.config):
        on_every_rank(lambda: require_disk_space(directory, snapshot_bytes, ranks_on_this_host()))
    save = run.directory.folders.save
    estimate = checkpoint.estimate_checkpoint_bytes(run.parameters, run.config.training.precision)
    if warning := on_first_rank(lambda: checkpoint.require_space(save, estimate)):
        announce(warning, run.mesh.is_first)
    announce(f"{opening(run, data, snapshot_bytes, weights.step)}\n{describe(plan)}", run.mesh.is_first)
    return snapshot_bytes


def build_engine(run: ResolvedRun, weights: InitialWeights) -> Engine:
    """Seed the random streams and build the engine with its initial weights. Collective."""
    seed_everything(run.config.training.seed, run.mesh.tensor_group)
    return engine.build_engine(run.config, run.vocab_size, run.mesh, weights.source)


def restore_engine(run: ResolvedRun, built: Engine, controller: Controller) -> RollbackStore:
    """Load the resumed checkpoint into the engine, after a snapshot of the initial weights. Collective.

    Returns:
        Store that contains this snapshot if the search of a resumed run may still go back to it.
    """
    rollback = RollbackStore(built, snapshot_dir(run.config))
    if run.resumed:
        if controller.needs_initial:
            # The engine has not stepped: it is in the state before the first step of the resumed run.
            rollback.capture(INITIAL, TrainState(), LossStatistics())
        checkpoint.resume(built, run.mesh, run.resumed.path, run.resumed.state, run.config)
    return rollback


def begin_run(
    run: ResolvedRun, data: TrainingData, state: TrainState, snapshot_bytes: int, weights: InitialWeights
) -> Metrics:
    """Write the run's files for the first time, open the sinks and record the start. Collective."""
    config, folders = run.config, run.directory.folders
    abandoned = run.directory.begin(config)
    metrics = open_metrics(
        folders.run_dir,
        folders.tensorboard_dir,
        config.training.train_iters,
        config.run.log_interval,
        state.step,
        run.mesh.is_first,
        config.adalrs.budget if config.adalrs.is_on else "kept",
        wandb_run(config, folders.run_dir),
    )
    start: dict[str, Any] = {
        "event": "resume" if run.resumed else "start",
        "run": run.directory.start.identity.id,
        "step": state.step,
        "total_steps": state.total_steps,
        "parameters": run.parameters,
        "world_size": run.mesh.world_size,
        "vocab_size": run.vocab_size,
        "data_order": data.order,
        "snapshot_bytes": snapshot_bytes,
        "weights_from": str(run.weights_from) if run.weights_from else None,
        "weights_step": weights.step,
    }
    if run.resumed:
        start["changed"] = checkpoint.changes_since(run.resumed.state, config, run.mesh)
    metrics.write("run", start)
    if abandoned:
        message = f"checkpoints after step {state.step} are set aside in {abandoned[0].parent}: "
        names = ", ".join(path.name for path in abandoned)
        place = {"step": state.step, "total_steps": state.total_steps}
        metrics.write("run", {"event": "rolled_back", **place, "message": message + names})
    return metrics


def snapshot_dir(config: Config) -> str | None:
    """Return the directory of snapshots; None if there are none, or if they are held in host memory."""
    return config.adalrs.snapshot_dir if config.live_snapshots else None


def wandb_run(config: Config, run_dir: Path) -> WandbRun | None:
    """Return the run of Weights & Biases; None if `--wandb-project` is not given."""
    project = config.run.wandb_project
    if project is None:
        return None
    return WandbRun(project, config.run.wandb_exp_name or run_dir.name, run_dir, config.to_flat())


def ranks_on_this_host() -> int:
    """Return the number of ranks on this host, which torchrun and DeepSpeed's launcher set."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
