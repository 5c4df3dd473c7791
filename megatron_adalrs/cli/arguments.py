"""Parser of the command line: flags win over the file of `--config`, the file over `--preset`, then defaults.

With `--load`, the configuration of the loaded run comes before the defaults.

If none of them gives the shape of the model, it is read from the Hugging Face folder or the run directory of
`--finetune-from`.

Nothing here imports torch, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import docstring_parser
import tyro
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from tyro.conf import OmitArgPrefixes

from megatron_adalrs.adalrs.settings import AdaLRSSettings, check_given, uses_setting
from megatron_adalrs.cli.aliases import derive_lengths, expand_aliases, find_value
from megatron_adalrs.cli.flag_help import flag_type
from megatron_adalrs.cli.run_values import values_of_run, values_to_continue
from megatron_adalrs.config import NESTED, Config, LossGuardConfig
from megatron_adalrs.config.base import describe_validation_error
from megatron_adalrs.config.paths import change_paths
from megatron_adalrs.config.run import RELATIVE_TO
from megatron_adalrs.huggingface.config_json import Shape, is_model
from megatron_adalrs.model.presets import PRESETS
from megatron_adalrs.utils.paths import expand_path
from megatron_adalrs.utils.text_files import parse_yaml, read_text

GROUPS: dict[str, type[BaseModel]] = {
    name: cast(type[BaseModel], field.annotation)
    for name, field in Config.model_fields.items()
    if name not in NESTED
}


def _adalrs_fields() -> dict[str, FieldInfo]:
    """Return the fields of AdaLRSSettings, a plain dataclass, in the form of pydantic's fields."""
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
    "enabled": "adalrs.mode: off, paper or robust",
}
"""Keys of version 0.1 and their names of today, for the message that refuses them."""
NESTED_FIELDS: dict[str, dict[str, FieldInfo]] = {
    "loss_guard": LossGuardConfig.model_fields,
    "adalrs": _adalrs_fields(),
}


def parse_arguments(arguments: Sequence[str], print_errors: bool = True) -> Config:
    """Parse a command line into a configuration.

    Args:
        arguments: Command line without the program's name.
        print_errors: False on all ranks but one, so that a mistake is reported once.

    Raises:
        ValueError: one sentence naming the field, its value and what is required.
        SystemExit: `--help` (0), or flags that cannot be parsed (2; the message is already printed).
    """
    arguments = expand_aliases(arguments)
    _refuse_renamed(arguments)
    chosen = _peek(arguments, ("config", "preset", "load", "run_dir", "finetune_from"))
    values = load_yaml(chosen["config"]) if "config" in chosen else {}
    preset = chosen.get("preset", values.get("preset"))
    if preset in PRESETS:
        values = PRESETS[preset] | values
    if load := chosen.get("load", values.get("load")):
        run_dir = chosen.get("run_dir", values.get("run_dir"))
        values = _checked(values_to_continue(Path(load), run_dir, load_yaml), "--load: ") | values
    values = _with_shape_of_source(values, chosen.get("finetune_from", values.get("finetune_from")))
    values = _of_chosen_mode(values, arguments)
    arguments = derive_lengths(arguments, values)
    flags: Any = tyro.cli(
        _flags(values), args=arguments, description=Config.__doc__, console_outputs=print_errors
    )
    given = {name: value for group in GROUPS for name, value in vars(getattr(flags, group)).items()}
    searching = values.get("adalrs", {}).keys() | _search_flags(arguments)
    adalrs = {name: value for name, value in vars(flags.adalrs).items() if name in searching}
    return config_from_values(given | {"loss_guard": vars(flags.loss_guard), "adalrs": adalrs})


def config_from_values(values: Mapping[str, Any]) -> Config:
    """Return the configuration of a flat mapping, in the form of the YAML file; None counts as not given.

    The groups in NESTED are mappings of their own.

    Raises:
        ValueError: one sentence naming the field, its value and what is required.
    """
    flat = PRESETS.get(values.get("preset") or "", {}) | _checked(values, source="")
    flat = _with_shape_of_source(flat, flat.get("finetune_from"))
    groups: dict[str, Any] = {
        name: {key: flat[key] for key in group.model_fields if key in flat} for name, group in GROUPS.items()
    }
    adalrs = flat.get("adalrs", {})
    check_given(adalrs.get("mode", "off"), adalrs)
    try:
        return Config(**groups, loss_guard=flat.get("loss_guard", {}), adalrs=AdaLRSSettings(**adalrs))
    except ValidationError as error:
        raise ValueError(describe_validation_error(error)) from None


def _search_flags(arguments: Sequence[str]) -> list[str]:
    """Return the names of the settings of the search that a command line gives."""
    flags = [token.partition("=")[0] for token in arguments if token.startswith("--adalrs.")]
    return [flag.removeprefix("--adalrs.").removeprefix("no-").replace("-", "_") for flag in flags]


def _refuse_renamed(arguments: Sequence[str]) -> None:
    """Reject the switch of the search of version 0.1.

    Raises:
        ValueError: Names the flag that takes its place.
    """
    if "enabled" in _search_flags(arguments):
        raise ValueError("--adalrs.enabled: no such flag; use --adalrs.mode off, paper or robust")


def _of_chosen_mode(values: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Drop those search settings of a file that the mode given by a flag does not use."""
    mode, settings = find_value(arguments, "--adalrs.mode"), values.get("adalrs", {})
    if mode is None or mode == settings.get("mode", "off"):
        return values
    kept = {name: value for name, value in settings.items() if uses_setting(mode, name)}
    return values | {"adalrs": kept}


def _with_shape_of_source(values: dict[str, Any], source: Path | str | None) -> dict[str, Any]:
    """Add the shape of the model in `source` to the values, unless they give a shape themselves.

    Raises:
        ValueError: There is no such folder, or the model does not support that shape.
    """
    if source is None or values.keys() >= {"num_layers", "hidden_size", "num_attention_heads"}:
        return values
    folder = Path(source)
    try:
        if is_model(folder):
            return Shape(folder).fields | values
    except ValueError as error:
        raise ValueError(f"--finetune-from: {error}") from None
    if saved := values_of_run(folder, "--finetune-from", load_yaml):
        return _checked(_shape_of_run(saved), "--finetune-from: ") | values
    if not folder.is_dir():
        raise ValueError(
            f"--finetune-from: {folder} is not a folder: required one with config.json, a run or a checkpoint"
        )
    return values


def _shape_of_run(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shape of the model in the configuration of a run, without dropout."""
    own = {"preset", "attention_dropout", "hidden_dropout"}
    shape = {
        name: values[name] for name in GROUPS["model"].model_fields if name in values and name not in own
    }
    if shape.get("position_embedding_type") != "rope" and "seq_length" in values:
        shape.setdefault("max_position_embeddings", values["seq_length"])
    return shape


def load_yaml(path: Path) -> dict[str, Any]:
    """Read and check the values of a configuration file.

    Raises:
        ValueError: The file cannot be read, has an unknown key (the closest one is suggested) or a value of
            the wrong type.
    """
    try:
        content = parse_yaml(read_text(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"--config: cannot read {path}: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"--config: {path} must hold a mapping of fields, not a {type(content).__name__}")
    place = content.pop(RELATIVE_TO, None)
    if place is not None and not isinstance(place, str):
        raise ValueError(f"{path}: {RELATIVE_TO}: {place!r}: must be a folder")
    values = _checked(content, source=f"{path}: ")
    if "config" in values:
        raise ValueError(f"{path}: config: {values['config']}: has no effect in a file; give it as a flag")
    return _relative_to(place, values) if place and Path(place) != Path.cwd() else values


def _relative_to(place: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a file with their relative paths taken from the folder `place`."""

    def change(name: str, field: FieldInfo, value: Any) -> Any:
        return change_paths(name, field, value, lambda path: os.path.join(place, path))

    found = {}
    for key, value in values.items():
        if key in NESTED_FIELDS:
            found[key] = {name: change(name, NESTED_FIELDS[key][name], one) for name, one in value.items()}
        else:
            found[key] = change(key, _all_fields()[key], value)
    return found


def _flags(values: Mapping[str, Any]) -> type:
    """Return a dataclass for tyro with a flag for every field and with `values` as defaults.

    tyro does not parse into Config itself, because the checks between fields would apply to defaults that
    flags still change, and their messages would have tyro's format.
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
    """Return a dataclass for tyro of the AdaLRS settings; `others` replace the fields of the same names."""
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


def _peek(arguments: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Return the values of some flags before the parser runs; the last occurrence wins."""
    values: dict[str, Any] = {}
    for name in names:
        value = find_value(arguments, f"--{name.replace('_', '-')}")
        if value is None or name == "preset":
            values |= {name: value} if value else {}
        else:
            _add(values, _all_fields(), name, value, source="")
    return values


def _checked(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the values with underscores in their keys, each converted to the type of its field.

    None counts as not given, also for a group of fields.
    """
    values: dict[str, Any] = {}
    for raw_key, value in content.items():
        key = str(raw_key).replace("-", "_")
        if key in NESTED_FIELDS:
            if value is None:
                continue
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
    if value is False and "off" in typing.get_args(field.annotation):
        value = "off"  # YAML reads an unquoted off as False
    try:
        valid = TypeAdapter(field.rebuild_annotation()).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise ValueError(f"{source}{key}: {value!r}: {message[0].lower() + message[1:]}") from None
    kinds = {field.annotation, *typing.get_args(field.annotation)}
    if isinstance(value, bool) != (bool in kinds):
        required = "true or false" if bool in kinds else "a value that is not true or false"
        raise ValueError(f"{source}{key}: {value!r}: required {required}")
    try:
        values[key] = change_paths(key, field, valid, expand_path)
    except ValueError as error:
        raise ValueError(f"{source}{key}: {value}: {error}") from None


def _all_fields() -> dict[str, FieldInfo]:
    return {name: field for group in GROUPS.values() for name, field in group.model_fields.items()}
