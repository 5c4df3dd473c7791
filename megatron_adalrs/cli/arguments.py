"""From the command line to a Config: defaults, then `--preset`, then the YAML file of `--config`, then flags.

Where none of them gives a shape, that of the Hugging Face folder or the run directory in `--finetune-from` is
taken.

Nothing here imports torch, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import docstring_parser
import tyro
import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from tyro.conf import OmitArgPrefixes

from megatron_adalrs.adalrs.settings import AdaLRSSettings
from megatron_adalrs.cli.aliases import derive_lengths, expand_aliases
from megatron_adalrs.cli.flag_help import flag_type
from megatron_adalrs.config import NESTED, Config, LossGuardConfig
from megatron_adalrs.config.base import describe_validation_error
from megatron_adalrs.config.run import RUN_CONFIG
from megatron_adalrs.huggingface.config_json import Shape, is_model
from megatron_adalrs.model.presets import PRESETS

GROUPS: dict[str, type[BaseModel]] = {
    name: cast(type[BaseModel], field.annotation)
    for name, field in Config.model_fields.items()
    if name not in NESTED
}


def _adalrs_fields() -> dict[str, FieldInfo]:
    """The settings of AdaLRS, a plain dataclass, described like the fields of the groups."""
    kinds = typing.get_type_hints(AdaLRSSettings)
    helps = {p.arg_name: p.description for p in docstring_parser.parse_from_object(AdaLRSSettings).params}
    return {
        field.name: FieldInfo(
            annotation=kinds[field.name], default=field.default, description=helps[field.name]
        )
        for field in dataclasses.fields(AdaLRSSettings)
    }


RENAMED = {
    "bad_numbers": "loss_guard",
    "pass_over": "extra_skipped_batches",
    "max_in_a_row": "max_consecutive",
    "max_passed_over": "max_skipped",
}
"""Keys of version 0.1 and their names of today, for the message that refuses them."""
NESTED_FIELDS: dict[str, dict[str, FieldInfo]] = {
    "loss_guard": LossGuardConfig.model_fields,
    "adalrs": _adalrs_fields(),
}


def parse_arguments(arguments: Sequence[str], print_errors: bool = True) -> Config:
    """Configuration of a command line.

    Args:
        arguments: the command line without the program's name.
        print_errors: False on all ranks but one, so that a mistake is told once.

    Raises:
        ValueError: one sentence naming the field, its value and what is required.
        SystemExit: `--help` (0), or flags that cannot be parsed (2; the message is already printed).
    """
    arguments = expand_aliases(arguments)
    chosen = _peek(arguments, ("config", "preset", "finetune_from"))
    values = load_yaml(Path(chosen["config"])) if "config" in chosen else {}
    preset = chosen.get("preset", values.get("preset"))
    if preset in PRESETS:
        values = PRESETS[preset] | values
    values = _with_shape_of_source(values, chosen.get("finetune_from", values.get("finetune_from")))
    arguments = derive_lengths(arguments, values)
    flags: Any = tyro.cli(
        _flags(values), args=arguments, description=Config.__doc__, console_outputs=print_errors
    )
    given = {name: value for group in GROUPS for name, value in vars(getattr(flags, group)).items()}
    return config_from_values(given | {name: vars(getattr(flags, name)) for name in NESTED})


def config_from_values(values: Mapping[str, Any]) -> Config:
    """Configuration from a flat mapping, as a YAML file holds it (groups in NESTED nested); None counts as
    not given.

    Raises:
        ValueError: one sentence naming the field, its value and what is required.
    """
    flat = PRESETS.get(values.get("preset") or "", {}) | _checked(values, source="")
    flat = _with_shape_of_source(flat, flat.get("finetune_from"))
    groups: dict[str, Any] = {
        name: {key: flat[key] for key in group.model_fields if key in flat} for name, group in GROUPS.items()
    }
    try:
        return Config(
            **groups, loss_guard=flat.get("loss_guard", {}), adalrs=AdaLRSSettings(**flat.get("adalrs", {}))
        )
    except ValidationError as error:
        raise ValueError(describe_validation_error(error)) from None


def _with_shape_of_source(values: dict[str, Any], source: Path | str | None) -> dict[str, Any]:
    """The same, with the shape of the model that a run begins with, where nothing else gives one.

    Raises:
        ValueError: there is no such folder; our model cannot have that shape.
    """
    if source is None or values.keys() >= {"num_layers", "hidden_size", "num_attention_heads"}:
        return values
    folder = Path(source)
    try:
        if is_model(folder):
            return Shape(folder).fields | values
        if (folder / RUN_CONFIG).is_file():
            return _shape_of_run(load_yaml(folder / RUN_CONFIG)) | values
    except ValueError as error:
        raise ValueError(f"--finetune-from: {error}") from None
    if not folder.is_dir():
        raise ValueError(
            f"--finetune-from: {folder} is no folder: required one with config.json, a run or a checkpoint"
        )
    return values


def _shape_of_run(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration of a run says of its model; the length of samples and dropout are each run's
    own."""
    own = {"preset", "seq_length", "attention_dropout", "hidden_dropout"}
    shape = {
        name: values[name] for name in GROUPS["model"].model_fields if name in values and name not in own
    }
    if shape.get("position_embedding_type") != "rope" and "seq_length" in values:
        shape.setdefault("max_position_embeddings", values["seq_length"])
    return shape


def load_yaml(path: Path) -> dict[str, Any]:
    """The checked values of a configuration file.

    Raises:
        ValueError: unreadable file, unknown key (the nearest one is suggested) or a value of the wrong kind.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config: cannot read {path}: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"--config: {path} must hold a mapping of fields, not a {type(content).__name__}")
    return _checked(content, source=f"{path}: ")


def _flags(values: Mapping[str, Any]) -> type:
    """A dataclass for tyro with every field as a flag, `values` as defaults and no checks but those of types.

    Config itself cannot stand in: its checks between fields would already judge the defaults, which flags may
    still change, and their messages would come in tyro's form instead of ours.
    """
    fields: list[tuple[str, Any]] = [
        (name, Annotated[_flag_group(name, group.model_fields, values, group.__doc__), OmitArgPrefixes])
        for name, group in GROUPS.items()
    ]
    loss_guard = LossGuardConfig.model_fields, values.get("loss_guard", {}), LossGuardConfig.__doc__
    fields += [
        ("loss_guard", _flag_group("loss_guard", *loss_guard)),
        ("adalrs", adalrs_flags(values.get("adalrs", {}))),
    ]
    return dataclasses.make_dataclass("Flags", fields, kw_only=True)


def adalrs_flags(defaults: Mapping[str, Any], **others: FieldInfo) -> type:
    """A dataclass for tyro of the settings of AdaLRS with these defaults; `others` replace those of their
    names."""
    return _flag_group("adalrs", NESTED_FIELDS["adalrs"] | others, defaults, "AdaLRS learning-rate search.")


def _flag_group(
    name: str, fields: Mapping[str, FieldInfo], values: Mapping[str, Any], title: str | None
) -> type:
    members = []
    for key, field in fields.items():
        default = values.get(key, field.default)
        is_required = field.is_required() and key not in values
        value = dataclasses.field() if is_required else dataclasses.field(default=default)
        members.append((key, flag_type(field), value))
    group = dataclasses.make_dataclass(name, members, kw_only=True)
    group.__doc__ = title
    return group


def _peek(arguments: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Values of a few flags, before the real parser runs; the last one wins, as there."""
    found = {}
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in names:
            following = arguments[index + 1 : index + 2]
            if equals or following:
                found[name] = value if equals else following[0]
    return found


def _checked(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values that are given, with hyphens in keys folded, every one of its field's type."""
    values: dict[str, Any] = {}
    for raw_key, value in content.items():
        key = str(raw_key).replace("-", "_")
        if key in NESTED_FIELDS:
            if not isinstance(value, Mapping):
                raise ValueError(f"{source}{key}: {value!r}: must be a mapping of {key}'s fields")
            values[key] = {}
            for raw_name, setting in value.items():
                name = str(raw_name).replace("-", "_")
                _add(values[key], NESTED_FIELDS[key], name, setting, f"{source}{key}.")
        else:
            _add(values, _all_fields(), key, value, source)
    return values


def _add(values: dict[str, Any], fields: Mapping[str, FieldInfo], key: str, value: Any, source: str) -> None:
    if key not in fields:
        if key in RENAMED:
            raise ValueError(f"{source}{key}: no such field; it has been renamed to {RENAMED[key]}")
        near = difflib.get_close_matches(key, [*fields, *NESTED], n=1)
        raise ValueError(f"{source}{key}: no such field" + (f"; did you mean {near[0]}?" if near else ""))
    if value is None:
        return
    field = fields[key]
    try:
        values[key] = TypeAdapter(field.rebuild_annotation()).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ValueError(f"{source}{key}: {value!r}: {message[0].lower() + message[1:]}") from None


def _all_fields() -> dict[str, FieldInfo]:
    return {name: field for group in GROUPS.values() for name, field in group.model_fields.items()}
