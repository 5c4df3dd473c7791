"""Turn a Hugging Face model (GPT-2, Llama, Qwen2) into a checkpoint of ours, or a run's checkpoint into such a model.

    python tools/convert_checkpoint.py --from-hf Qwen2.5-1.5B --to checkpoints/qwen2.5-1.5b
    python tools/convert_checkpoint.py --from runs/mine --to-hf exported --dtype bfloat16

The first writes weights alone, for --finetune-from, which reads Hugging Face's folder as well. The second reads the
newest checkpoint of a run, or the one that is named, of any mesh and ZeRO stage. One tensor is in memory at a time.
Nothing is overwritten. Exit code 0 if all is well, 2 with one message if not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Arguments:
    from_hf: Path | None = None
    """Folder of config.json and safetensors to read; goes with --to."""
    to: Path | None = None
    """Folder to write a checkpoint to: new or empty."""
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Run directory, folder of checkpoints or checkpoint to read; goes with --to-hf."""
    to_hf: Path | None = None
    """Folder to write config.json, safetensors and the tokenizer's files to: new or empty."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the weights that --to-hf writes. Default: what the run computes with; that of an imported model."""
    max_shard_size: float = 5.0
    """Largest file of weights, in GB; a single tensor may be larger."""


def main(arguments: Sequence[str] | None = None) -> int:
    given = tyro.cli(Arguments, args=arguments, description=__doc__)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is computed
    try:
        print(convert(given))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(given: Arguments) -> str:
    """What was done, in words.

    Raises:
        ValueError, OSError: the flags contradict each other; something cannot be read or written.
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
    from megatron_adalrs.checkpoint import open_model, write_weights_only
    from megatron_adalrs.huggingface.config_json import CONFIG, is_model
    from megatron_adalrs.model.gpt import count_parameters

    if not is_model(source):
        raise ValueError(f"--from-hf: {source} has no {CONFIG}: required a folder of Hugging Face's")
    opened = open_model(source, "--from-hf")
    checkpoint = write_weights_only(opened, target, max_shard_size)
    # Padding rows of the vocabulary are none of the model's.
    unpadded = opened.model.model_copy(update={"make_vocab_size_divisible_by": 1})
    return f"{checkpoint}: {count_parameters(unpadded, opened.vocab_size)} parameters, for --finetune-from {target}"


def export_model(source: Path, target: Path, dtype: str | None, max_shard_size: int) -> str:
    import torch

    from megatron_adalrs.checkpoint import locate_model, open_model
    from megatron_adalrs.huggingface.config_json import family_of
    from megatron_adalrs.huggingface.tokenizer_export import made_for_transformers
    from megatron_adalrs.huggingface.writer import write_model

    opened = open_model(locate_model(source, "--from"), "--from")
    tokenizer = opened.tokenizer()
    cast = getattr(torch, dtype) if dtype else None
    try:
        family = family_of(opened.model)
        more, told = made_for_transformers(tokenizer.kind, tokenizer.files, family.model_type)
        write_model(
            target, opened.model, opened.vocab_size, opened.weights, (lambda name: cast) if cast else opened.dtype,
            tokenizer.ids, {**tokenizer.files, **more}, max_shard_size,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"--to-hf: {error}") from None
    step = "" if opened.step is None else f", step {opened.step}"
    return "\n".join(filter(None, (f"{target}: the model of {opened.path}{step}", tokenizer.note, told)))
