"""Open a model for reading: a run's checkpoint, a weights-only checkpoint or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megatron_adalrs.checkpoint.compatibility import saved_mesh_shape
from megatron_adalrs.checkpoint.load import find_checkpoint, read_state
from megatron_adalrs.checkpoint.manifest import ENGINE, STATE, TOKENIZER, WEIGHTS
from megatron_adalrs.checkpoint.tokenizer_files import Tokenizer, tokenizer_of_run
from megatron_adalrs.config import DataConfig, ModelConfig
from megatron_adalrs.config.base import describe_validation_error
from megatron_adalrs.engine import SavedWeights
from megatron_adalrs.huggingface.companion_files import find_companion_files
from megatron_adalrs.huggingface.config_json import is_model
from megatron_adalrs.huggingface.reader import HuggingFaceModel, parameter_shapes
from megatron_adalrs.huggingface.tensor_files import TensorFiles
from megatron_adalrs.model.initialization import WeightSource


@dataclass(frozen=True)
class OpenedModel:
    """A model whose weights are read on demand, one parameter at a time."""

    path: Path
    """Folder of the checkpoint, or the Hugging Face folder."""
    model: ModelConfig
    vocab_size: int
    """Size of the vocabulary without padding."""
    weights: WeightSource
    dtype: Callable[[str], torch.dtype]
    """Precision of a parameter, by its name in `GPT`: that of the run, or of the file."""
    step: int | None
    """Step of the checkpoint; None for a Hugging Face folder."""
    tokenizer: Callable[[], Tokenizer]
    """Find the tokenizer. Raises OSError if a file of it cannot be read."""
    data: DataConfig | None = None
    """Data of the run; None if the model does not come from a run's checkpoint."""
    tokenizer_sha256: str | None = None
    """Digest of the tokenizer that made the run's data, if it is known."""
    companions: Mapping[str, Path] = field(default_factory=dict)
    """Tokenizer and generation files beside the weights; a run's checkpoint has none."""


def locate_model(path: Path, flag: str, strict: bool = False, verify: bool = False) -> Path:
    """Return the absolute path of a Hugging Face folder, or of the checkpoint that `find_checkpoint` finds.

    Raises:
        ValueError: There is neither.
    """
    return (path if is_model(path) else find_checkpoint(path, strict, verify, flag)).resolve()


def open_model(path: Path, flag: str) -> OpenedModel:
    """Open a model that `locate_model` found.

    Raises:
        ValueError: It cannot be read; the message begins with `flag`.
    """
    if is_model(path):
        try:
            return _open_hugging_face(path)
        except ValueError as error:
            raise ValueError(f"{flag}: {error}") from None
    state = read_state(path, flag)
    saved = state["config"]
    fields = ModelConfig.model_fields
    try:
        model = ModelConfig(**{name: saved[name] for name in fields if name in saved})
        vocab_size, step = int(state["identity"]["vocab_size"]), int(state["progress"]["step"])
        return (_open_weights_only if (path / WEIGHTS).is_dir() else _open_run)(
            path, state, model, vocab_size, step
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{flag}: {path / STATE} is not valid ({type(error).__name__}: {error})") from None
    except ValidationError as error:
        raise ValueError(f"{flag}: {path}: {describe_validation_error(error)}") from None
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def _open_hugging_face(path: Path) -> OpenedModel:
    found = HuggingFaceModel(path)
    tokenizer = Tokenizer(find_companion_files(path), found.shape.token_ids)
    return OpenedModel(
        path,
        found.model,
        found.vocab_size,
        found,
        found.dtype,
        None,
        lambda: tokenizer,
        companions=tokenizer.files,
    )


def _open_weights_only(
    path: Path, state: dict[str, Any], model: ModelConfig, vocab_size: int, step: int
) -> OpenedModel:
    files, shapes = TensorFiles(path / WEIGHTS), parameter_shapes(model, vocab_size)
    if missing := shapes.keys() - files.names:
        raise ValueError(f"{path / WEIGHTS} has no {', '.join(sorted(missing))}")
    for name, shape in shapes.items():
        if files.entry(name).shape != shape:
            raise ValueError(
                f"{path / WEIGHTS}: {name} has shape {list(files.entry(name).shape)}, not {list(shape)}"
            )
    tokenizer = Tokenizer(find_companion_files(path / TOKENIZER), state.get("token_ids", {}))
    return OpenedModel(
        path,
        model,
        vocab_size,
        lambda name, shape: files(name),
        lambda name: files.entry(name).dtype,
        step,
        lambda: tokenizer,
        companions=tokenizer.files,
    )


def _open_run(
    path: Path, state: dict[str, Any], model: ModelConfig, vocab_size: int, step: int
) -> OpenedModel:
    saved, mesh = state["config"], saved_mesh_shape(state)
    weights = SavedWeights(path / ENGINE, model, vocab_size, saved["zero_stage"], mesh.pipe, mesh.tensor)
    precision = torch.bfloat16 if saved["bf16"] else torch.float16 if saved["fp16"] else torch.float32
    data = DataConfig(**{name: saved[name] for name in DataConfig.model_fields if name in saved})
    tokenizer = partial(tokenizer_of_run, saved, data, vocab_size)
    return OpenedModel(
        path,
        model,
        vocab_size,
        weights,
        lambda name: precision,
        step,
        tokenizer,
        data,
        state["identity"]["tokenizer_sha256"],
    )
