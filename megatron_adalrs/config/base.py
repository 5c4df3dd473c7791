"""What every group of the configuration is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, lt=1)]


class Group(BaseModel):
    """Frozen; unknown fields and numbers that are not finite are refused; a field's docstring is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def shown_division(size: int, by: int) -> str:
    """The arithmetic of a division that leaves a rest: "10 = 3 x 3 + 1"."""
    return f"{size} = {size // by} x {by} + {size % by}"
