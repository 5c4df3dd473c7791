"""Configuration: frozen models that define flags, YAML keys, defaults, help texts and checks.

Every field is a command-line flag (`num_layers` -> `--num-layers`) and a YAML key of the same name. Fields of
the groups in `NESTED` have the name of the group as a prefix, as in `adalrs.window`. `cli/arguments.py`
parses them. This package does not import torch.

There is one file for each group. Checks within a group are in its file, checks between groups are here.
"""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from megatron_adalrs.adalrs.settings import AdaLRSSettings
from megatron_adalrs.config.base import Group, require
from megatron_adalrs.config.data import DataConfig
from megatron_adalrs.config.loss_guard import LossGuardConfig
from megatron_adalrs.config.model import ModelConfig
from megatron_adalrs.config.optimizer import OptimizerConfig
from megatron_adalrs.config.parallel import ParallelConfig, require_possible_mesh
from megatron_adalrs.config.run import PROCESS_FIELDS, RunConfig
from megatron_adalrs.config.training import TrainingConfig

__all__ = [
    "NESTED",
    "Config",
    "DataConfig",
    "LossGuardConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "TrainingConfig",
]

NESTED = ("adalrs", "loss_guard")
"""Groups whose fields have the name of the group as a prefix."""


class Config(Group):
    """Pretrain a GPT model with DeepSpeed. --adalrs.mode robust searches the learning rate."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    run: RunConfig = RunConfig()
    loss_guard: LossGuardConfig = LossGuardConfig()
    adalrs: AdaLRSSettings = AdaLRSSettings()

    @model_validator(mode="after")
    def _schedule_and_search_fit(self) -> Config:
        warmup, decay = self.optimizer.lr_warmup_iters, self.lr_decay_iters
        require(
            warmup < decay or self.optimizer.lr_decay_style == "constant",
            f"lr_warmup_iters: {warmup} leaves nothing of lr_decay_iters ({decay}) to decay in",
        )
        if self.optimizer.lr_decay_style == "WSD":
            require(
                warmup + self.lr_wsd_decay_iters <= decay,
                f"lr_wsd_decay_iters: warm-up {warmup} + decay {self.lr_wsd_decay_iters} exceed "
                f"lr_decay_iters {decay}",
            )
        if self.adalrs.is_on:
            self.adalrs.resolve(self.training.train_iters, warmup)
        return self

    @model_validator(mode="after")
    def _loss_guard_may_skip(self) -> Config:
        settings, train_iters = self.loss_guard, self.training.train_iters
        if settings.policy in ("skip", "rewind"):
            most = settings.max_skipped_batches(train_iters)
            at_once = settings.max_skipped_at_once
            parts = (
                f"{at_once - settings.extra_skipped_batches} + extra_skipped_batches "
                f"{settings.extra_skipped_batches}"
            )
            parts = f"rewind_interval {parts}" if settings.policy == "rewind" else parts
            require(
                settings.max_skipped_at_once <= most,
                f"loss_guard.max_skipped: {settings.max_skipped} of train_iters {train_iters} are {most} "
                f"batches, and one event may skip {parts} = {at_once}",
            )
        return self

    @model_validator(mode="after")
    def _mesh_is_possible(self) -> Config:
        require_possible_mesh(self.parallel, self.model, self.training)
        return self

    @property
    def lr_decay_iters(self) -> int:
        """Step at which the decay ends."""
        return self.optimizer.lr_decay_iters or self.training.train_iters

    @property
    def lr_wsd_decay_iters(self) -> int:
        """Number of steps in the last phase of WSD."""
        return self.optimizer.lr_wsd_decay_iters or max(1, self.lr_decay_iters // 10)

    @property
    def live_snapshots(self) -> int:
        """Maximum number of snapshots at a time: those of the search, and one to rewind to."""
        to_rewind = int(self.loss_guard.policy == "rewind")
        if not self.adalrs.is_on:
            return to_rewind
        plan = self.adalrs.resolve(self.training.train_iters, self.optimizer.lr_warmup_iters)
        return plan.live_snapshots + to_rewind

    def global_batch_size(self, data_parallel_size: int) -> int:
        """Return the number of samples per optimizer step.

        Raises:
            ValueError: If it is not a multiple of micro_batch_size * data-parallel ranks.
        """
        micro, size = self.training.micro_batch_size, self.training.global_batch_size
        per_pass = micro * data_parallel_size
        require(
            size is None or size % per_pass == 0,
            f"global_batch_size: {size} is not a multiple of micro_batch_size ({micro}) x data-parallel "
            f"ranks ({data_parallel_size}) = {per_pass}",
        )
        return size or per_pass

    def micro_batches_per_step(self, data_parallel_size: int) -> int:
        """Return the number of forward and backward passes of a rank per optimizer step."""
        return self.global_batch_size(data_parallel_size) // (
            self.training.micro_batch_size * data_parallel_size
        )

    def to_flat(self) -> dict[str, Any]:
        """Return the plain values of a run, where only the groups in `NESTED` are nested.

        Values that were not given and have no default are left out, and so are the fields of one process.
        """
        groups = self.model_dump(mode="json")
        nested = {name: groups.pop(name) for name in NESTED}
        flat = {
            name: value for group in groups.values() for name, value in group.items() if value is not None
        }
        for name in PROCESS_FIELDS:
            flat.pop(name, None)
        nested["adalrs"] = self.adalrs.used()
        return flat | {
            group: {name: value for name, value in fields.items() if value is not None}
            for group, fields in nested.items()
        }
