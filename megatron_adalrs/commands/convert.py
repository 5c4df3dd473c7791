"""Convert a Hugging Face model (GPT-2, Llama, Qwen2) to a checkpoint, or the reverse.

    megatron-adalrs convert --from-hf Qwen2.5-1.5B --to checkpoints/qwen2.5-1.5b
    megatron-adalrs convert --from runs/mine --to-hf exported --dtype bfloat16

The first command writes a weights-only checkpoint, to be used with `pretrain --finetune-from` (which
also reads a Hugging Face folder directly). The second reads the newest checkpoint of a run, or the checkpoint
that is named, written with any parallel layout and ZeRO stage. Only one tensor is held in memory at a time.
Existing files are never overwritten.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megatron_adalrs.cli.program import parse_flags, reports_errors


@dataclass(frozen=True)
class Arguments:
    from_hf: Path | None = None
    """Hugging Face folder (config.json and safetensors) to read. Requires --to."""
    to: Path | None = None
    """Folder to write the checkpoint to; it must be new or empty."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Run directory, folder of checkpoints or single checkpoint to read. Requires --to-hf."""
    to_hf: Path | None = None
    """Folder to write config.json, safetensors and the tokenizer's files to; it must be new or empty."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the weights that --to-hf writes. Default: the run's, or that of the imported model."""
    max_shard_size: float = 5.0
    """Maximum size of a file of weights, in GB; a larger tensor gets a file of its own."""


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Convert the model and print a summary.

    Returns:
        0, or 2 if the flags contradict each other or a file cannot be read or written.
    """
    flags = parse_flags(Arguments, __doc__, arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is computed
    print(convert(flags))
    return 0


def convert(given: Arguments) -> str:
    """Convert in the direction that the flags give.

    Returns:
        A summary to print.

    Raises:
        ValueError: The flags contradict each other, or the model cannot be converted.
        OSError: A file cannot be read or written.
    """
    if not 0 < given.max_shard_size < float("inf"):
        raise ValueError(f"max_shard_size: {given.max_shard_size} GB: must be above 0")
    shard = int(given.max_shard_size * 1e9)
    match (given.from_hf, given.to, given.from_, given.to_hf):
        case (Path() as source, Path() as target, None, None):
            if given.dtype:
                raise ValueError(
                    f"dtype: {given.dtype}: only --to-hf casts, --to keeps the precision of the files"
                )
            return import_model(source, target, shard)
        case (None, None, Path() as source, Path() as target):
            return export_model(source, target, given.dtype, shard)
    raise ValueError("give --from-hf with --to, or --from with --to-hf")


def import_model(source: Path, target: Path, max_shard_size: int) -> str:
    """Write a Hugging Face model as a checkpoint of the weights only, and return a summary."""
    from megatron_adalrs.checkpoint import open_model, write_weights_only
    from megatron_adalrs.huggingface.config_json import CONFIG, is_model
    from megatron_adalrs.model.gpt import count_parameters

    if not is_model(source):
        raise ValueError(f"--from-hf: {source} has no {CONFIG}: required a Hugging Face folder")
    opened = open_model(source, "--from-hf")
    checkpoint = write_weights_only(opened, target, max_shard_size)
    # The padding rows of the vocabulary are not counted.
    unpadded = opened.model.model_copy(update={"make_vocab_size_divisible_by": 1})
    parameters = count_parameters(unpadded, opened.vocab_size)
    return f"{checkpoint}: {parameters} parameters, for --finetune-from {target}"


def export_model(source: Path, target: Path, dtype: str | None, max_shard_size: int) -> str:
    """Write a checkpoint as a Hugging Face model, and return a summary."""
    import torch

    from megatron_adalrs.checkpoint import locate_model, open_model
    from megatron_adalrs.huggingface.config_json import family_of
    from megatron_adalrs.huggingface.tokenizer_export import export_tokenizer
    from megatron_adalrs.huggingface.writer import write_model

    opened = open_model(locate_model(source, "--from"), "--from")
    tokenizer = opened.tokenizer()
    cast = getattr(torch, dtype) if dtype else None
    try:
        family = family_of(opened.model)
        more, note = export_tokenizer(
            tokenizer.kind, tokenizer.files, family.model_type, opened.model.max_positions
        )
        write_model(
            target,
            opened.model,
            opened.vocab_size,
            opened.weights,
            (lambda name: cast) if cast else opened.dtype,
            tokenizer.ids,
            {**tokenizer.files, **more},
            max_shard_size,
        )
    except ValueError as error:
        raise ValueError(f"--to-hf: {error}") from None
    step = "" if opened.step is None else f", step {opened.step}"
    return "\n".join(filter(None, (f"{target}: the model of {opened.path}{step}", tokenizer.note, note)))


if __name__ == "__main__":
    sys.exit(main())
