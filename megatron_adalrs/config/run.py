"""Where a run is kept and what it shows."""

from __future__ import annotations

from pathlib import Path

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_adalrs.config.base import Group, require

RUN_CONFIG = "config.yaml"
"""File of a run directory that holds the effective configuration."""


class RunConfig(Group):
    """Where the run is kept and what it shows."""

    config: Path | None = None
    """YAML file with any of these fields; flags win over it. A run writes its own to
    <run_dir>/config.yaml."""
    run_dir: Path | None = None
    """Folder of config.yaml, metrics.jsonl, decisions.jsonl, tensorboard/. Default: runs/<date-time>."""
    save: Path | None = None
    """Folder of checkpoints. Default: <run_dir>/checkpoints."""
    load: Path | None = None
    """Resume from the newest checkpoint in this folder (or run directory), or from this very checkpoint."""
    finetune_from: Path | None = None
    """Begin a new run with the weights alone of the newest checkpoint in this folder (or run directory), of
    this very checkpoint, or of this folder of Hugging Face's (config.json and safetensors: GPT-2, Llama,
    Qwen2). The shape of such a folder, and of a run directory, is the default where neither a preset nor a
    file gives one. Step, optimizer, schedule, data order and search are fresh. On any mesh, precision and
    ZeRO stage. A run that was begun so and is resumed goes on from its own checkpoint."""
    auto_resume: bool = False
    """Resume from the newest complete checkpoint in save, if there is one; for jobs that are put back in a
    queue."""
    strict_load: bool = False
    """Refuse to resume where the newest checkpoint is damaged, instead of taking the next older one."""
    verify_checkpoint: bool = False
    """Compare the hashes of all files of a checkpoint before it is loaded, not only their sizes."""
    save_interval: PositiveInt | None = None
    """Steps between checkpoints. Default: only at the end and when interrupted."""
    async_save: bool = False
    """Go on training while the checkpoint of an interval is written from a copy in host memory. Writing that
    fails stops the run."""
    keep_last: PositiveInt | None = None
    """Remove complete checkpoints but the newest so many. Default: keep all."""
    save_retain_interval: PositiveInt | None = None
    """Checkpoints of steps that this divides are kept for good."""
    exit_interval: PositiveInt | None = None
    """Save and end at steps that this divides, with exit code 143: to be resumed."""
    exit_duration_in_mins: PositiveFloat | None = None
    """Save and end after so many minutes, with exit code 143: to be resumed."""
    eval_interval: PositiveInt | None = None
    """Steps between evaluations. Default: only at the end."""
    eval_iters: PositiveInt = 100
    """Batches of global_batch_size in one evaluation, at most one pass over the validation part."""
    log_interval: PositiveInt = 10
    """Steps between console lines and TensorBoard points; metrics.jsonl has every step."""
    tensorboard_dir: Path | None = None
    """TensorBoard's folder. Default: <run_dir>/tensorboard."""
    wandb_project: str | None = None
    """Also show what TensorBoard shows as a run in this project of Weights & Biases; its WANDB_* environment
    variables hold, such as WANDB_MODE=offline. Default: not."""
    wandb_exp_name: str | None = None
    """The run's name there. Default: that of run_dir."""
    dry_run: bool = False
    """Print the mesh and the memory that each rank would need, and stop: no ranks, no memory, no data
    needed."""
    world_size: PositiveInt | None = None
    """With --dry-run: number of ranks to plan for. Default: the launcher's."""
    check_ranks_every: NonNegativeInt = 0
    """Debugging: every so many steps, compare what all ranks must agree on and stop where they do not. 0:
    never."""
    distributed_timeout_minutes: PositiveFloat = 10.0
    """Minutes after which a rank gives up waiting for the others in a collective."""
    heartbeat_timeout: NonNegativeFloat = 60.0
    """Seconds of silence after which the other ranks take one for lost and leave, with exit code 4. 0: none
    watches."""
    local_rank: int | None = None
    """Passed by the DeepSpeed launcher; the environment decides."""

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
            f"launched",
        )
        return self

    @model_validator(mode="after")
    def _auto_resume_knows_where(self) -> RunConfig:
        require(
            not self.auto_resume or self.run_dir is not None,
            "auto_resume: needs run_dir, or a job that starts again would not find its checkpoints",
        )
        return self
