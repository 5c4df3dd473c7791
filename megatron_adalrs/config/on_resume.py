"""What a changed field does when a run is resumed: one policy for each field of the configuration.

`checkpoint/compatibility.py` applies the policies. A field of a group in `NESTED` has the name of the
group as a prefix.
"""

from __future__ import annotations

from enum import Enum


class OnResume(Enum):
    """Effect of a field that differs between a checkpoint and the run that resumes it."""

    SAME = "must be the same, or the run is refused"
    APPLIES = "applies from the resumed step"
    SEARCH = "applies from the resumed step; refused while a search of the learning rate is running"
    CONTENT = "may differ if what it selects (data, their order, tokenizer) is the same"
    MESH = "may differ, as [another mesh](checkpoints.md#resuming)"
    IRRELEVANT = "concerns only the process that it is given to"


_FIELDS = {
    OnResume.SEARCH: (
        "train_iters",
        "lr",
        "min_lr",
        "lr_decay_style",
        "lr_decay_iters",
        "lr_warmup_iters",
        "lr_wsd_decay_style",
        "lr_wsd_decay_iters",
    ),
    OnResume.SAME: (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "ffn_hidden_size",
        "seq_length",
        "max_position_embeddings",
        "make_vocab_size_divisible_by",
        "normalization",
        "norm_epsilon",
        "position_embedding_type",
        "rotary_base",
        "use_rope_scaling",
        "rope_scaling_factor",
        "rope_scaling_low_freq_factor",
        "rope_scaling_high_freq_factor",
        "rope_scaling_original_max_position_embeddings",
        "swiglu",
        "add_bias_linear",
        "add_qkv_bias",
        "untie_embeddings_and_output_weights",
        "init_method_std",
        "reset_attention_mask",
        "reset_position_ids",
        "eod_mask_loss",
        "eod_token_id",
        "global_batch_size",
        "bf16",
        "fp16",
        "seed",
        "finetune_from",
        "adalrs.mode",
        "adalrs.alpha",
        "adalrs.beta",
        "adalrs.decay",
        "adalrs.window",
        "adalrs.search_start",
        "adalrs.search_end",
        "adalrs.decay_threshold",
        "adalrs.on_fail",
        "adalrs.backtrack",
        "adalrs.min_scale",
        "adalrs.max_scale",
        "adalrs.max_discarded",
        "adalrs.budget",
        "adalrs.climb",
        "adalrs.climb_steps",
        "adalrs.climb_gain",
        "adalrs.trial_steps",
        "adalrs.return_steps",
        "adalrs.restart_steps",
        "adalrs.confidence",
        "adalrs.restart_factor",
        "adalrs.restart_confidence",
        "adalrs.finest_factor",
    ),
    OnResume.APPLIES: (
        "attention_dropout",
        "hidden_dropout",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_eps",
        "clip_grad",
        "micro_batch_size",
        "recompute_granularity",
        "deepspeed_config",
        "valid_data_path",
        "test_data_path",
        "save_interval",
        "async_save",
        "keep_last",
        "save_retain_interval",
        "eval_interval",
        "eval_iters",
        "loss_guard.policy",
        "loss_guard.sigma",
        "loss_guard.window",
        "loss_guard.min_history",
        "loss_guard.rewind_interval",
        "loss_guard.extra_skipped_batches",
        "loss_guard.max_consecutive",
        "loss_guard.max_skipped",
    ),
    OnResume.CONTENT: (
        "vocab_size",
        "data_path",
        "train_data_path",
        "blend_sizes",
        "split",
        "tokenizer_type",
        "tokenizer_model",
        "vocab_file",
        "merge_file",
    ),
    OnResume.MESH: (
        "zero_stage",
        "pipeline_model_parallel_size",
        "pipeline_partition",
        "tensor_model_parallel_size",
        "context_parallel_size",
        "sequence_parallel",
    ),
    OnResume.IRRELEVANT: (
        "preset",
        "data_cache_path",
        "config",
        "run_dir",
        "save",
        "load",
        "auto_resume",
        "strict_load",
        "verify_checkpoint",
        "exit_interval",
        "exit_duration_in_mins",
        "log_interval",
        "verbose",
        "tensorboard_dir",
        "wandb_project",
        "wandb_exp_name",
        "dry_run",
        "world_size",
        "check_ranks_every",
        "distributed_timeout_minutes",
        "heartbeat_timeout",
        "local_rank",
        "adalrs.snapshot_dir",
    ),
}

ON_RESUME = {name: policy for policy, names in _FIELDS.items() for name in names}
"""The policy of each field, by its name as a YAML key."""


def policy_of(name: str) -> OnResume:
    """Return the policy of a field, or of a setting in the file of `deepspeed_config`."""
    return ON_RESUME["deepspeed_config" if name.startswith("deepspeed_config.") else name]
