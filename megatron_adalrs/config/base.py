"""What every group of the configuration is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Group(BaseModel):
    """Frozen; unknown fields and numbers that are not finite are refused; a field's docstring is its help
    text."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


FLAT_GROUPS = frozenset({"model", "data", "optimizer", "training", "parallel", "run"})
"""Groups whose fields are flags without a prefix."""


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def shown_division(size: int, by: int) -> str:
    """The arithmetic of a division that leaves a rest: "10 = 3 x 3 + 1"."""
    return f"{size} = {size // by} x {by} + {size % by}"


def describe_validation_error(error: ValidationError) -> str:
    """One line for the first mistake of a pydantic error."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    names = [str(part) for part in first["loc"] if part not in FLAT_GROUPS]
    if first["type"] == "value_error" or not names:
        return message
    if first["type"] == "missing":
        return f"{names[0]}: is required"
    return f"{'.'.join(names)}: {first['input']!r}: {message[0].lower() + message[1:]}"
