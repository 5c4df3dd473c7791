"""`--finetune-from`: initialize a new run with the weights of another model, on any mesh and ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_adalrs.checkpoint.compatibility import require_same_tokenizer
from megatron_adalrs.checkpoint.model_shape import shape_of
from megatron_adalrs.checkpoint.open_model import locate_model, open_model
from megatron_adalrs.checkpoint.tokenizer_files import require_matching_tokenizer
from megatron_adalrs.config import ModelConfig, RunConfig
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
    theirs = {"vocab_size": opened.vocab_size} | shape_of(opened.model)
    mine = {"vocab_size": vocab_size} | shape_of(config)
    for name, value in mine.items():
        if theirs[name] != value:
            remedy = (
                f"; use --vocab-size {theirs[name]}" if name == "vocab_size" and theirs[name] > value else ""
            )
            raise ValueError(
                f"{FINETUNE_FROM}: {source} has {name} {theirs[name]!r}, this run has {value!r}{remedy}"
            )
    return opened.weights, opened.step
