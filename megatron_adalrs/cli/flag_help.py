"""The entry of one field in `--help`: text, placeholder of the value, and default."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic.fields import FieldInfo

from megatron_adalrs.config.corpora import Entries

_PLACEHOLDERS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", bool: "{True,False}"}


def flag_type(field: FieldInfo) -> Any:
    """Return the type of a field, annotated for tyro with its help text and a short placeholder.

    A field that may be None explains its default in the last sentence of its docstring, "Default: ...". It is
    shown where the defaults of other fields are.
    """
    text = " ".join((field.description or "").split())
    text, _, default_if_none = text.partition("Default: ")
    default_if_none = default_if_none.removesuffix(".")

    def default_hint(label: str) -> str:
        if label != "None":
            return f"(default: {label})"
        return f"(default: {default_if_none})" if default_if_none else "(optional)"

    metavar = None if field.annotation is bool else _placeholder(field.annotation)
    settings = tyro.conf.arg(help=text.strip(), metavar=metavar, help_behavior_hint=default_hint)
    return Annotated[field.annotation, settings]


def _placeholder(annotation: Any) -> str | None:
    """Return the name of a value of this type, without the None of an optional field."""
    if annotation == Entries:
        return "[SIZE] PREFIX ..."
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _placeholder(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return _placeholder(kinds[0]) if len(kinds) == 1 else None
    if origin is Literal:
        return "{" + ",".join(map(str, typing.get_args(annotation))) + "}"
    return _PLACEHOLDERS.get(annotation)
