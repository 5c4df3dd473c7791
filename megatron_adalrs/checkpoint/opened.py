"""A model in any form that one is kept in: a run's checkpoint, one of weights alone, a folder of Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_adalrs.arguments import describe
from megatron_adalrs.checkpoint.fitting import shape_of
from megatron_adalrs.checkpoint.load import find_checkpoint, read_state
from megatron_adalrs.checkpoint.manifest import ENGINE, STATE, TOKENIZER, WEIGHTS, sha256
from megatron_adalrs.config import DataConfig, ModelConfig
from megatron_adalrs.data.preprocess import Description, read_description
from megatron_adalrs.engine import SavedWeights
from megatron_adalrs.huggingface.companions import companions_in
from megatron_adalrs.huggingface.reader import HuggingFaceModel, parameter_shapes
from megatron_adalrs.huggingface.shape import Shape, is_model
from megatron_adalrs.huggingface.tensor_files import TensorFiles
from megatron_adalrs.model.gpt import WeightSource


@dataclass(frozen=True)
class Tokenizer:
    """What goes with a model's weights where they are exported."""

    files: Mapping[str, Path]
    """By the names that Hugging Face gives them; with them, settings of generation."""
    ids: Mapping[str, Any]
    """What is known of bos_token_id, eos_token_id, pad_token_id."""
    note: str | None = None
    """What a person should know of it."""
    kind: str | None = None
    """Of `TOKENIZER_KINDS`; None: the files came with a model."""


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
    tokenizer: Callable[[], Tokenizer]
    """Looks for it. Raises OSError: one that is there cannot be read."""
    data: DataConfig | None = None
    """What it was trained on; None: not of a run of ours."""
    tokenizer_sha256: str | None = None
    """Of the tokenizer that made its data, where its run knew it."""


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
    except (KeyError, TypeError) as error:
        raise ValueError(f"{flag}: {path / STATE} is not what a run saves ({type(error).__name__}: {error})") from None
    except ValidationError as error:
        raise ValueError(f"{flag}: {path}: {describe(error)}") from None
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def _of_hugging_face(path: Path) -> OpenedModel:
    found = HuggingFaceModel(path)
    tokenizer = Tokenizer(companions_in(path), found.shape.token_ids)
    return OpenedModel(path, found.model, found.vocab_size, found, found.dtype, None, lambda: tokenizer)


def _of_weights_alone(path: Path, state: dict[str, Any], model: ModelConfig, vocab_size: int, step: int) -> OpenedModel:
    files, shapes = TensorFiles(path / WEIGHTS), parameter_shapes(model, vocab_size)
    if lacking := shapes.keys() - files.names:
        raise ValueError(f"{path / WEIGHTS} lacks {', '.join(sorted(lacking))}")
    for name, shape in shapes.items():
        if files.entry(name).shape != shape:
            raise ValueError(f"{path / WEIGHTS}: {name} has shape {list(files.entry(name).shape)}, not {list(shape)}")
    tokenizer = Tokenizer(companions_in(path / TOKENIZER), state.get("token_ids", {}))
    return OpenedModel(
        path, model, vocab_size, lambda name, shape: files(name), lambda name: files.entry(name).dtype, step,
        lambda: tokenizer,
    )  # fmt: skip


def _of_run(path: Path, state: dict[str, Any], model: ModelConfig, vocab_size: int, step: int) -> OpenedModel:
    saved, grid = state["config"], shape_of(state)
    weights = SavedWeights(path / ENGINE, model, vocab_size, saved["zero_stage"], grid.pipe, grid.tensor)
    precision = torch.bfloat16 if saved.get("bf16") else torch.float16 if saved.get("fp16") else torch.float32
    data = DataConfig(**{name: saved[name] for name in DataConfig.model_fields if name in saved})
    tokenizer = partial(_tokenizer_of_run, saved, data, vocab_size)
    return OpenedModel(
        path, model, vocab_size, weights, lambda name: precision, step, tokenizer, data,
        state["identity"].get("tokenizer_sha256"),
    )  # fmt: skip


def _tokenizer_of_run(saved: dict[str, Any], data: DataConfig, vocab_size: int) -> Tokenizer:
    """The files of the tokenizer that made a run's data, as far as they can be found, its token ids, and what to tell.

    Args:
        saved: the run's configuration.
    """
    corpus, made_with = _making_of(data)
    eod = made_with.eod if made_with else data.eod_token_id
    ids = {"eos_token_id": eod} if eod is not None and eod < vocab_size else {}
    kind = saved.get("tokenizer_type") or (made_with.tokenizer_type if made_with else None)
    if kind == "ByteTokenizer":
        return Tokenizer({}, ids, kind=kind)
    named, origin = saved.get("tokenizer_model"), saved.get("finetune_from")
    if named is not None:
        found, before = _tokenizer_files(Path(named), kind), {}
    elif origin is not None:
        found, before = _tokenizer_before(Path(origin))
    else:
        return Tokenizer({}, ids, "the run names no tokenizer, none is copied")
    file = found.get("tokenizer.json") or found.get("tokenizer.model")
    if file is None or not file.is_file():
        return Tokenizer({}, ids, f"there is no tokenizer in {named or origin}, none is copied")
    if made_with is not None and sha256(file) != made_with.tokenizer_sha256:
        return Tokenizer({}, ids, f"{file} is not what made {corpus}, no tokenizer is copied")
    return Tokenizer(found, before | ids, f"{file} is copied", kind)


def _making_of(data: DataConfig) -> tuple[str, Description] | tuple[None, None]:
    """A corpus that has a note of how it was made, and the note. All corpora of a run have the same tokenizer."""
    try:
        noted = ((corpus.prefix, read_description(corpus.prefix)) for corpus in data.corpora)
        return next(((prefix, note) for prefix, note in noted if note), (None, None))
    except (ValueError, OSError):  # whoever exports need not have the data any more
        return None, None


def _tokenizer_files(named: Path, kind: str | None) -> dict[str, Path]:
    if kind == "SentencePieceTokenizer":
        return {"tokenizer.model": named}
    if named.is_dir():
        return companions_in(named)
    # What is beside a file of another name may belong to another.
    return companions_in(named.parent) if named.name == "tokenizer.json" else {"tokenizer.json": named}


def _tokenizer_before(origin: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """Files and token ids of the model that a run began with, if these came with it."""
    try:
        if is_model(origin):
            return companions_in(origin), Shape(origin).token_ids
        return companions_in(origin / TOKENIZER), read_state(origin).get("token_ids", {})
    except ValueError:  # it need not be there any more
        return {}, {}
