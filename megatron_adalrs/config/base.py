"""Base class and checks of the configuration groups."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Group(BaseModel):
    """Base class of a frozen configuration group; the docstring of a field is its help text.

    Unknown fields and numbers that are not finite are refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


FLAT_GROUPS = frozenset({"model", "data", "optimizer", "training", "parallel", "run"})
"""Groups whose fields are flags without a prefix."""


def require(condition: bool, message: str) -> None:
    """Raise ValueError with this message unless the condition is true."""
    if not condition:
        raise ValueError(message)


def shown_division(size: int, by: int) -> str:
    """Return the arithmetic of a division with remainder: "10 = 3 x 3 + 1"."""
    return f"{size} = {size // by} x {by} + {size % by}"


def describe_validation_error(error: ValidationError) -> str:
    """Return one line about the first error in a pydantic error."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    names = [str(part) for part in first["loc"] if part not in FLAT_GROUPS]
    if first["type"] == "value_error" or not names:
        return message
    if first["type"] == "missing":
        return f"{names[0]}: is required"
    return f"{'.'.join(names)}: {first['input']!r}: {message[0].lower() + message[1:]}"
