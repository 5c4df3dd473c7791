"""Rotary positions in config.json: as version 4 of transformers writes them, in rope_theta and rope_scaling,
and as version 5 does, in rope_parameters. Both are read and both are written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.config.model import RopeScaling

SCALED = "llama3"
"""The one kind of scaling that our model has."""
_SIZES = tuple(field.name for field in fields(RopeScaling))
_KNOWN = ("rope_type", "type", "rope_theta", "partial_rotary_factor")

Refusal = Callable[[str, Any, str], ValueError]
"""Of a field, its value and what is required."""


def is_positive_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def rotary_fields(content: Mapping[str, Any], refused: Refusal) -> dict[str, Any]:
    """Fields of a ModelConfig that say how positions are rotated.

    Args:
        content: of config.json.

    Raises:
        ValueError: by `refused`; our model has no such positions, or the two ways to tell them contradict
            each other.
    """
    bases, scalings = {"rope_theta": content.get("rope_theta")}, {}
    if content.get("partial_rotary_factor") not in (None, 1):
        raise refused(
            "partial_rotary_factor", content["partial_rotary_factor"], "our model rotates all of a head"
        )
    for name in ("rope_scaling", "rope_parameters"):
        parameters = content.get(name)
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise refused(name, parameters, "must hold parameters by name")
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
    # Version 5 would take this one, which other families have, for the one within.
    original = content.get("original_max_position_embeddings", scaling["original_max_position_embeddings"])
    if original != scaling["original_max_position_embeddings"]:
        raise refused("original_max_position_embeddings", original, f"rotary positions have {scaling}")
    return found | {f"rope_scaling_{name}": value for name, value in scaling.items()}


def rotary_json(model: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that say how a model rotates positions, for versions 4 and 5 of
    transformers."""
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
    """Of one of the two fields, the values of a RopeScaling by name; None: it says that nothing is scaled."""
    kinds = {key: parameters[key] for key in ("rope_type", "type") if parameters.get(key) is not None}
    kind = _agreed(name, kinds, "default", refused)
    if kind not in ("default", SCALED):
        raise refused(
            name, kind, f"our model cannot scale rotary positions so, required rope_type {SCALED} or default"
        )
    if parameters.get("partial_rotary_factor") not in (None, 1):
        raise refused(name, parameters, "our model rotates all of a head, required partial_rotary_factor 1")
    sizes = _SIZES if kind == SCALED else ()
    if others := parameters.keys() - {*_KNOWN, *sizes}:
        raise refused(name, parameters, f"our model has no {', '.join(sorted(others))} of rope_type {kind}")
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
    """The value that all have who give one."""
    values = list(given.values()) or [default]
    if any(value != values[0] for value in values):
        raise refused(name, dict(given), "they contradict each other")
    return values[0]
