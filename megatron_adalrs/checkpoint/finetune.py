"""`--finetune-from`: initialize a new run with the weights of another model, on any mesh and ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_adalrs.checkpoint.compatibility import require_same_tokenizer
from megatron_adalrs.checkpoint.open_model import locate_model, open_model
from megatron_adalrs.checkpoint.tokenizer_files import require_matching_tokenizer
from megatron_adalrs.config import ModelConfig, RunConfig
from megatron_adalrs.config.model import RopeScaling
from megatron_adalrs.data.tokenizer import DataTokenizer
from megatron_adalrs.model.initialization import WeightSource

FINETUNE_FROM = "--finetune-from"


def find_initial_weights(run: RunConfig, saved: dict[str, Any] | None) -> Path | None:
    """Return the checkpoint or Hugging Face folder that the run's initial weights come from.

    Args:
        saved: State of the checkpoint that is resumed, if there is one; it names the source of its run.

    Returns:
        An absolute path, or None if the weights are initialized at random.

    Raises:
        ValueError: There is no complete checkpoint, or the resumed run was initialized with other weights.
    """
    asked = run.finetune_from
    if saved is None:
        if asked is None:
            return None
        return locate_model(asked, FINETUNE_FROM, run.strict_load, run.verify_checkpoint)
    noted = saved["config"].get("finetune_from")
    source = Path(noted) if noted else None
    if asked is not None and (source is None or asked.resolve() not in (source, *source.parents)):
        began = f"the weights of {source}" if source else "random weights"
        raise ValueError(
            f"{FINETUNE_FROM}: {asked}: the run that --load or --auto-resume resumes began with {began}; "
            "remove the flag, or start a new run without --load and --auto-resume"
        )
    return source


def open_initial_weights(
    source: Path, config: ModelConfig, vocab_size: int, tokenizer: DataTokenizer | None
) -> tuple[WeightSource, int | None]:
    """Open the initial weights, which are read parameter by parameter.

    Args:
        config: Configuration of the model to initialize.
        vocab_size: Size of its vocabulary without padding.
        tokenizer: Tokenizer of its data, if it is known.

    Returns:
        The weights, and the step that they were saved at; None for a Hugging Face folder.

    Raises:
        ValueError: They cannot be read, or shape or tokenizer differ; the message names the first difference.
    """
    opened = open_model(source, FINETUNE_FROM)
    if tokenizer:
        require_same_tokenizer(f"{FINETUNE_FROM}: {source}", opened.tokenizer_sha256, tokenizer.sha256)
        require_matching_tokenizer(opened.companions, opened.model, tokenizer, FINETUNE_FROM)
    theirs, mine = dict(_shape(opened.model, opened.vocab_size)), dict(_shape(config, vocab_size))
    for name, value in mine.items():
        if theirs[name] != value:
            remedy = (
                f"; use --vocab-size {theirs[name]}" if name == "vocab_size" and theirs[name] > value else ""
            )
            raise ValueError(
                f"{FINETUNE_FROM}: {source} has {name} {theirs[name]!r}, this run has {value!r}{remedy}"
            )
    return opened.weights, opened.step


def _shape(model: ModelConfig, vocab_size: int) -> Iterator[tuple[str, Any]]:
    """Yield the fields that two models must share to have the same parameters and computation."""
    yield "vocab_size", vocab_size
    for name in ("hidden_size", "num_layers", "num_attention_heads"):
        yield name, getattr(model, name)
    yield "num_query_groups", model.num_key_value_heads
    yield "kv_channels", model.head_dim
    yield "ffn_hidden_size", model.mlp_size
    for name in ("swiglu", "normalization", "norm_epsilon", "position_embedding_type"):
        yield name, getattr(model, name)
    is_learned = model.position_embedding_type == "learned_absolute"
    yield "max_position_embeddings", model.max_positions if is_learned else None
    yield "rotary_base", None if is_learned else model.rotary_base
    yield "use_rope_scaling", model.use_rope_scaling
    for field in fields(RopeScaling):
        yield f"rope_scaling_{field.name}", getattr(model.rope_scaling, field.name, None)
    yield "add_bias_linear", model.add_bias_linear
    yield "add_qkv_bias", model.has_qkv_bias
    yield "untie_embeddings_and_output_weights", model.untie_embeddings_and_output_weights
