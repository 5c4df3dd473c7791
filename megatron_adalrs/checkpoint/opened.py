"""A model in any form that one is kept in: a run's checkpoint, one of weights alone, a folder of Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_adalrs.arguments import describe
from megatron_adalrs.checkpoint.fitting import shape_of
from megatron_adalrs.checkpoint.load import find_checkpoint, read_state
from megatron_adalrs.checkpoint.manifest import ENGINE, TOKENIZER, WEIGHTS, sha256
from megatron_adalrs.config import ModelConfig
from megatron_adalrs.data.preprocess import Description, read_description
from megatron_adalrs.engine import SavedWeights
from megatron_adalrs.huggingface.companions import companions_in
from megatron_adalrs.huggingface.reader import HuggingFaceModel, parameter_shapes
from megatron_adalrs.huggingface.shape import is_model
from megatron_adalrs.huggingface.tensor_files import TensorFiles
from megatron_adalrs.model.gpt import WeightSource


@dataclass(frozen=True)
class OpenedModel:
    """A model whose weights are read when they are asked for, one parameter at a time."""

    path: Path
    """Folder of the checkpoint, or of Hugging Face's files."""
    model: ModelConfig
    vocab_size: int
    """Before padding."""
    weights: WeightSource
    dtype: Callable[[str], torch.dtype]
    """What the model computes with, by GPT's names: a run's precision, or that of the file."""
    step: int | None
    """None: not of a run of ours."""
    token_ids: Mapping[str, Any] = field(default_factory=dict)
    """What is known of bos_token_id, eos_token_id, pad_token_id."""
    companions: Mapping[str, Path] = field(default_factory=dict)
    """Files of its tokenizer and the like, by the names that Hugging Face gives them."""
    note: str | None = None
    """What a person who exports it should know of its tokenizer."""


def locate_model(path: Path, flag: str, strict: bool = False, verify: bool = False) -> Path:
    """What `path` means: a folder of Hugging Face's itself, or else what `find_checkpoint` finds. Absolute.

    Raises:
        ValueError: neither is there.
    """
    return (path if is_model(path) else find_checkpoint(path, strict, verify, flag)).resolve()


def open_model(path: Path, flag: str) -> OpenedModel:
    """Open what `locate_model` found.

    Raises:
        ValueError: it cannot be read; the message begins with `flag`.
    """
    if is_model(path):
        try:
            return _of_hugging_face(path)
        except ValueError as error:
            raise ValueError(f"{flag}: {error}") from None
    state = read_state(path, flag)
    saved = state["config"]
    fields = ModelConfig.model_fields
    try:
        model = ModelConfig(**{name: saved[name] for name in fields if name in saved})
        vocab_size, step = int(state["identity"]["vocab_size"]), int(state["progress"]["step"])
        return (_of_weights_alone if (path / WEIGHTS).is_dir() else _of_run)(path, state, model, vocab_size, step)
    except ValidationError as error:
        raise ValueError(f"{flag}: {path}: {describe(error)}") from None
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def _of_hugging_face(path: Path) -> OpenedModel:
    found = HuggingFaceModel(path)
    return OpenedModel(
        path, found.model, found.vocab_size, found, found.dtype, None, found.shape.token_ids, companions_in(path)
    )


def _of_weights_alone(path: Path, state: dict[str, Any], model: ModelConfig, vocab_size: int, step: int) -> OpenedModel:
    files, shapes = TensorFiles(path / WEIGHTS), parameter_shapes(model, vocab_size)
    if lacking := shapes.keys() - files.names:
        raise ValueError(f"{path / WEIGHTS} lacks {', '.join(sorted(lacking))}")
    for name, shape in shapes.items():
        if files.entry(name).shape != shape:
            raise ValueError(f"{path / WEIGHTS}: {name} has shape {list(files.entry(name).shape)}, not {list(shape)}")
    return OpenedModel(
        path, model, vocab_size, lambda name, shape: files(name), lambda name: files.entry(name).dtype, step,
        state.get("token_ids", {}), companions_in(path / TOKENIZER),
    )  # fmt: skip


def _of_run(path: Path, state: dict[str, Any], model: ModelConfig, vocab_size: int, step: int) -> OpenedModel:
    saved, grid = state["config"], shape_of(state)
    weights = SavedWeights(path / ENGINE, model, vocab_size, saved["zero_stage"], grid.pipe, grid.tensor)
    precision = torch.bfloat16 if saved.get("bf16") else torch.float16 if saved.get("fp16") else torch.float32
    description = _description(saved)
    companions, note = _companions_of_run(saved, description)
    ids = dict(_token_ids_before(saved)) if companions else {}
    if description is not None and description.eod < vocab_size:
        ids["eos_token_id"] = description.eod
    return OpenedModel(path, model, vocab_size, weights, lambda name: precision, step, ids, companions, note)


def _description(saved: dict[str, Any]) -> Description | None:
    try:
        return read_description(saved["data_path"])
    except (KeyError, ValueError, OSError):  # the data need not be there any more
        return None


def _origin(saved: dict[str, Any]) -> Path | None:
    return Path(saved["finetune_from"]) if saved.get("finetune_from") else None


def _token_ids_before(saved: dict[str, Any]) -> Mapping[str, Any]:
    """Of the model that a run began with."""
    origin = _origin(saved)
    try:
        return open_model(origin, "").token_ids if origin is not None else {}
    except ValueError:
        return {}


def _companions_of_run(saved: dict[str, Any], description: Description | None) -> tuple[dict[str, Path], str]:
    """The files of its tokenizer, and what to tell of them."""
    kind, model = saved.get("tokenizer_type"), saved.get("tokenizer_model")
    kind = kind or (description.tokenizer_type if description else None)
    origin = _origin(saved)
    if kind == "ByteTokenizer":
        return {}, "ByteTokenizer has no files: token ids are the bytes of UTF-8, and 256 ends a document"
    if model is not None and kind == "SentencePieceTokenizer":
        found = {"tokenizer.model": Path(model)}
    elif model is not None:
        path = Path(model)
        found = companions_in(path if path.is_dir() else path.parent)
        if not path.is_dir():
            found["tokenizer.json"] = path
    elif origin is not None:
        found = companions_in(origin) or companions_in(origin / TOKENIZER)
    else:
        return {}, "the run names no tokenizer: none is copied"
    main = next((found[name] for name in ("tokenizer.json", "tokenizer.model") if name in found), None)
    if main is None or not main.is_file():
        return {}, f"there is no tokenizer in {model or origin}: none is copied"
    if description is not None and sha256(main) != description.tokenizer_sha256:
        return {}, f"{main} is not the tokenizer that made {saved['data_path']}: none is copied"
    if kind == "SentencePieceTokenizer":
        return found, (
            "tokenizer.model is copied, for the package sentencepiece; a tokenizer of transformers may split texts "
            "otherwise"
        )
    return found, f"the tokenizer of {main.parent} is copied"
