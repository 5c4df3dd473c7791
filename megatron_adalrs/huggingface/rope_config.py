"""Rotary position embedding in config.json.

Version 4 of transformers writes rope_theta and rope_scaling, version 5 writes rope_parameters. Both are read,
and both are written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.config.model import RopeScaling

SCALED = "llama3"
"""The only scaling that our model supports."""
_SIZES = tuple(field.name for field in fields(RopeScaling))
_KNOWN = ("rope_type", "type", "rope_theta", "partial_rotary_factor")

Refusal = Callable[[str, Any, str], ValueError]
"""Makes the error for a field, its value and the requirement."""


def is_positive_number(value: Any) -> bool:
    """Return whether a value is a finite number above 0."""
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def rotary_fields(content: Mapping[str, Any], refused: Refusal) -> dict[str, Any]:
    """Return the fields of a ModelConfig for rotary position embedding.

    Args:
        content: Content of config.json.
        refused: Makes the error to raise.

    Raises:
        ValueError: A value is not supported, or the fields of the two versions contradict each other.
    """
    bases, scalings = {"rope_theta": content.get("rope_theta")}, {}
    if content.get("partial_rotary_factor") not in (None, 1):
        raise refused(
            "partial_rotary_factor",
            content["partial_rotary_factor"],
            "partial rotation is not supported",
        )
    for name in ("rope_scaling", "rope_parameters"):
        parameters = content.get(name)
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise refused(name, parameters, "must be an object with parameters")
        bases[name], scalings[name] = parameters.get("rope_theta"), _scaling(name, parameters, refused)
    base = _agreed(
        "rope_theta", {name: one for name, one in bases.items() if one is not None}, 10000.0, refused
    )
    if not is_positive_number(base):
        raise refused("rope_theta", base, "must be a number above 0")
    scaling = _agreed("rope_scaling", scalings, None, refused)
    found = {"rotary_base": float(base), "use_rope_scaling": scaling is not None}
    if scaling is None:
        return found
    # Version 5 prefers this field, which other families have, to the one in rope_parameters.
    original = content.get("original_max_position_embeddings", scaling["original_max_position_embeddings"])
    if original != scaling["original_max_position_embeddings"]:
        raise refused("original_max_position_embeddings", original, f"rotary positions have {scaling}")
    return found | {f"rope_scaling_{name}": value for name, value in scaling.items()}


def rotary_json(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json for rotary position embedding, for versions 4 and 5."""
    if model.rope_scaling is None:
        kind = {"rope_type": "default"}
        return {"rope_theta": model.rotary_base, "rope_parameters": kind | {"rope_theta": model.rotary_base}}
    kind = {"rope_type": SCALED} | asdict(model.rope_scaling)
    return {
        "rope_theta": model.rotary_base,
        "rope_scaling": kind,
        "rope_parameters": kind | {"rope_theta": model.rotary_base},
    }


def _scaling(name: str, parameters: Mapping[str, Any], refused: Refusal) -> dict[str, Any] | None:
    """Return the values of a RopeScaling by name, or None if the field does not scale positions."""
    kinds = {key: parameters[key] for key in ("rope_type", "type") if parameters.get(key) is not None}
    kind = _agreed(name, kinds, "default", refused)
    if kind not in ("default", SCALED):
        raise refused(name, kind, f"this scaling is not supported, required rope_type {SCALED} or default")
    if parameters.get("partial_rotary_factor") not in (None, 1):
        raise refused(name, parameters, "partial rotation is not supported, required partial_rotary_factor 1")
    sizes = _SIZES if kind == SCALED else ()
    if others := parameters.keys() - {*_KNOWN, *sizes}:
        raise refused(name, parameters, f"not supported for rope_type {kind}: {', '.join(sorted(others))}")
    if kind != SCALED:
        return None
    for size in sizes:
        if not is_positive_number(parameters.get(size)):
            raise refused(f"{name}.{size}", parameters.get(size), "must be a number above 0")
    factor, low, high, original = (parameters[size] for size in sizes)
    if factor < 1:
        raise refused(f"{name}.factor", factor, "must be at least 1")
    if low >= high:
        raise refused(f"{name}.low_freq_factor", low, f"must be below high_freq_factor, {high}")
    if original != int(original):
        raise refused(f"{name}.original_max_position_embeddings", original, "must be a whole number above 0")
    return asdict(RopeScaling(float(factor), float(low), float(high), int(original)))


def _agreed(name: str, given: Mapping[str, Any], default: Any, refused: Refusal) -> Any:
    """Return the value that all given fields share, or the default if none is given."""
    values = list(given.values()) or [default]
    if any(value != values[0] for value in values):
        raise refused(name, dict(given), "they contradict each other")
    return values[0]
