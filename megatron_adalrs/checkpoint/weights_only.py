"""Write a checkpoint that holds only weights, which `--finetune-from` reads and `--load` refuses.

FOLDER/iter_0000000/
    weights/          safetensors: whole parameters by their names in `GPT`, without padding rows
    tokenizer/        files of the tokenizer that came with the model, if any
    state.json        configuration and vocabulary size of the model
    manifest.json
FOLDER/latest
"""

from __future__ import annotations

from pathlib import Path

from megatron_adalrs.checkpoint.manifest import (
    LATEST,
    STATE,
    TOKENIZER,
    WEIGHTS,
    fsync_and_hash,
    write_json,
    write_manifest,
)
from megatron_adalrs.checkpoint.open_model import OpenedModel
from megatron_adalrs.huggingface.companion_files import copy_companion_files
from megatron_adalrs.huggingface.reader import parameter_shapes
from megatron_adalrs.huggingface.tensor_files import Entry, write_tensors
from megatron_adalrs.huggingface.writer import MAX_SHARD_SIZE
from megatron_adalrs.utils.atomic_files import new_folder


def write_weights_only(opened: OpenedModel, folder: Path, max_shard_size: int = MAX_SHARD_SIZE) -> Path:
    """Write a model as a checkpoint of step 0, with one parameter in memory at a time.

    The folder is renamed once it is complete.

    Returns:
        Folder of the checkpoint.

    Raises:
        ValueError: `folder` is not empty.
        OSError: A file cannot be written.
    """
    tokenizer = opened.tokenizer()
    shapes = parameter_shapes(opened.model, opened.vocab_size)
    entries = [Entry(name, opened.dtype(name), shape) for name, shape in shapes.items()]
    with new_folder(folder) as draft:
        checkpoint = draft / "iter_0000000"
        for place in (checkpoint / WEIGHTS, checkpoint / TOKENIZER):
            place.mkdir(parents=True)
        write_tensors(
            checkpoint / WEIGHTS, entries, lambda name: opened.weights(name, shapes[name]), max_shard_size
        )
        copy_companion_files(tokenizer.files, checkpoint / TOKENIZER)
        state = {
            "world_size": 1,
            "progress": {"step": 0},
            "identity": {"vocab_size": opened.vocab_size},
            "config": opened.model.model_dump(mode="json", exclude_none=True),
            "token_ids": dict(tokenizer.ids),
            "weights_of": str(opened.path),
        }
        write_json(checkpoint / STATE, state)
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        write_manifest(
            checkpoint,
            {str(path.relative_to(checkpoint)): fsync_and_hash(path) for path in files},
            {"step": 0},
        )
        (draft / LATEST).write_text(checkpoint.name + "\n", encoding="utf-8")
    return folder / checkpoint.name
