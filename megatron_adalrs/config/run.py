"""Configuration of a run's folders, checkpoints, evaluation, logging and supervision."""

from __future__ import annotations

from pathlib import Path

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_adalrs.config.base import Group, require

RUN_CONFIG = "config.yaml"
"""File of a run directory with the effective configuration."""


RELATIVE_TO = "relative_to"
"""Key of a run's config.yaml: folder that its relative paths start from, where the run was started."""
PROCESS_FIELDS = frozenset(
    {
        *("config", "load", "auto_resume", "dry_run", "world_size", "local_rank"),
        *("exit_interval", "exit_duration_in_mins"),
    }
)
"""Fields that belong to one process of a run. They are not stored with the run."""


class RunConfig(Group):
    """Folders, checkpoints, evaluation, logging and supervision."""

    config: Path | None = None
    """YAML file with any of these fields. Flags take precedence. A run writes its configuration to
    <run_dir>/config.yaml."""
    run_dir: Path | None = None
    """Folder for config.yaml, metrics.jsonl, decisions.jsonl and tensorboard/. Default: that of the run that
    is loaded, or runs/<date-time>."""
    save: Path | None = None
    """Folder for checkpoints. Default: <run_dir>/checkpoints."""
    load: Path | None = None
    """Resume from this checkpoint, or from the latest checkpoint in this folder or run directory. The run's
    configuration is the default of all other fields. With another run_dir, a new run begins there."""
    finetune_from: Path | None = None
    """Start a new run from the weights of this checkpoint, of the newest checkpoint in this folder or run
    directory, or of this Hugging Face model folder (config.json and safetensors; GPT-2, Llama or Qwen2). Only
    weights are loaded, for any mesh, precision and ZeRO stage. The shape of the source is the default where
    neither a preset nor a file gives one."""
    auto_resume: bool = False
    """Resume from the latest complete checkpoint of the run, if there is one, whatever load is; for jobs that
    are requeued."""
    strict_load: bool = False
    """Fail if the newest checkpoint is damaged, instead of resuming from the next older one."""
    verify_checkpoint: bool = False
    """Verify the hashes of all files of a checkpoint before loading it, not only their sizes."""
    save_interval: PositiveInt | None = None
    """Steps between checkpoints. Default: save only at the end and when interrupted."""
    async_save: bool = False
    """Continue training while a checkpoint is written from a copy in host memory. A failed write stops the
    run."""
    keep_last: PositiveInt | None = None
    """Number of newest complete checkpoints to keep; older ones are removed. Default: all."""
    save_retain_interval: PositiveInt | None = None
    """Never remove checkpoints of steps that are multiples of this number."""
    exit_interval: PositiveInt | None = None
    """Save and exit with code 143 at steps that are multiples of this number; the run can be resumed."""
    exit_duration_in_mins: PositiveFloat | None = None
    """Save and exit with code 143 after this many minutes; the run can be resumed."""
    eval_interval: PositiveInt | None = None
    """Steps between evaluations. Default: evaluate only at the end."""
    eval_iters: NonNegativeInt = 100
    """Batches of global_batch_size per evaluation, at most one pass over the validation data. 0 turns all
    evaluation off."""
    log_interval: PositiveInt = 10
    """Steps between console lines and TensorBoard points. metrics.jsonl has every step."""
    verbose: bool = False
    """Show the log messages and warnings of DeepSpeed and PyTorch too, not only errors. The launcher's own
    lines do not depend on it."""
    tensorboard_dir: Path | None = None
    """Folder for TensorBoard files. Default: <run_dir>/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project that receives the same scalars as TensorBoard. WANDB_* environment variables
    apply, such as WANDB_MODE=offline."""
    wandb_exp_name: str | None = None
    """Name of the run in Weights & Biases. Default: the name of run_dir."""
    dry_run: bool = False
    """Print the mesh and the memory that each rank would need, and exit. Needs no ranks and no data."""
    world_size: PositiveInt | None = None
    """With dry_run: number of ranks to plan for. Default: that of the launcher."""
    check_ranks_every: NonNegativeInt = 0
    """For debugging: steps between comparisons of the state that all ranks must share. A difference stops the
    run. 0 disables the check."""
    distributed_timeout_minutes: PositiveFloat = 10.0
    """Timeout of collectives in minutes."""
    heartbeat_timeout: NonNegativeFloat = 60.0
    """Seconds without a heartbeat after which a rank counts as lost and the others exit with code 4. 0
    disables the heartbeat."""
    local_rank: int | None = None
    """Passed by the DeepSpeed launcher and ignored; the environment variable LOCAL_RANK is used."""

    @model_validator(mode="after")
    def _named_where_shown(self) -> RunConfig:
        require(
            self.wandb_exp_name is None or self.wandb_project is not None,
            f"wandb_exp_name: {self.wandb_exp_name}: names a run in a project; give wandb_project too",
        )
        return self

    @model_validator(mode="after")
    def _planned_world_only(self) -> RunConfig:
        require(
            self.world_size is None or self.dry_run,
            f"world_size: {self.world_size} can be planned with --dry-run only; a run has the ranks that are "
            "launched",
        )
        return self

    @model_validator(mode="after")
    def _auto_resume_knows_where(self) -> RunConfig:
        require(
            not self.auto_resume or self.run_dir is not None or self.load is not None,
            "auto_resume: needs run_dir, or a job that starts again would not find its checkpoints",
        )
        return self
