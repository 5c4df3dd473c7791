"""Simulate searches on a loss surface whose best rate is known: what noise, lengths and initial rates make of them.

    python tools/simulate.py                                     # a run like the tiny GPT of tools/reproduce_paper.py
    python tools/simulate.py --like runs/fixed --train-iters 20000 --runs 20    # noise and descent of a recorded loss
    python tools/simulate.py --adalrs.mode robust --noise 0.17 --initial 1 --lengths 0.5 1 2 --plot simulation.html

The model is in megatron_adalrs/adalrs/simulate.py. It is no evidence about real runs; it helps to plan them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic.fields import FieldInfo

from megatron_adalrs.adalrs.settings import AdaLRSSettings
from megatron_adalrs.cli.arguments import adalrs_flags

_TEXTS = {
    "train_iters": "Steps of a run.",
    "block": "Steps that are simulated as one, by their mean. Default: as many as leave 2000 or fewer of them.",
    "schedule": "Warm-up over 3 % of the run, then cosine to a tenth of the rate; or WSD: level, then linearly to a "
    "tenth over the last fifth.",
    "like": "A recorded loss (as for tools/replay.py) to take noise and descent from.",
    "like_ratio": "The recorded run's base rate in parts of the rate of fastest descent, which its record cannot tell.",
    "column": "Column or key of the recorded loss.",
    "tag": "TensorBoard tag of the recorded loss.",
    "noise": "Standard deviations of a step's loss, nats. Default: 1/4, 1 and 4 times the recorded or 0.17: batches 16 "
    "times as large, as they are, and 1/16.",
    "lengths": "Windows, or race lengths, in parts of their defaults for this run.",
    "initial": "Initial rates in parts of the best fixed one.",
    "runs": "Runs of each kind, seeds first_seed and following.",
    "first_seed": "The first seed.",
    "json": "Print every mean as one JSON object.",
    "plot": "Write the probability of ending within a factor of 2 into this HTML file.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 where it was asked for something impossible."""
    flags = tyro.cli(
        _flags(), args=list(sys.argv[1:] if arguments is None else arguments), description=__doc__
    )
    from megatron_adalrs.analysis.simulation_study import Study, surface_of
    from megatron_adalrs.analysis.simulation_tables import plot, print_study

    try:
        check(flags)
        modes = [flags.adalrs.mode] if flags.adalrs.mode else ["paper", "robust"]
        settings = [AdaLRSSettings(**vars(flags.adalrs) | {"mode": mode}) for mode in modes]
        surface = surface_of(flags.like, flags.column, flags.tag, flags.schedule, flags.like_ratio)
        noises = flags.noise or [surface.noise / 4, surface.noise, surface.noise * 4]
        started = time.perf_counter()
        study = Study(
            surface, flags.schedule, flags.train_iters, flags.block or -(-flags.train_iters // 2000)
        )
        seeds = range(flags.first_seed, flags.first_seed + flags.runs)
        cells = [
            cell for one in settings for cell in study.cells(one, noises, flags.lengths, flags.initial, seeds)
        ]
        seconds = time.perf_counter() - started
        if flags.plot:
            plot(flags.plot, cells)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if flags.json:
        content = {
            "surface": dataclasses.asdict(surface),
            "cells": [dataclasses.asdict(cell) for cell in cells],
        }
        print(
            json.dumps(
                content | {"train_iters": flags.train_iters, "schedule": flags.schedule, "seconds": seconds}
            )
        )
    else:
        print_study(study, cells, len(seeds), seconds)
    return 0


def check(flags: Any) -> None:
    """Raises ValueError: names the first flag out of its range."""
    for name in ("noise", "lengths", "initial"):
        for value in getattr(flags, name) or ():
            least = "at least 0" if name == "noise" else "above 0"
            if not (value > 0 or (name == "noise" and value == 0)):
                raise ValueError(f"--{name}={value}: must be {least}")
    for name in ("train_iters", "runs", "like_ratio", "block"):
        if getattr(flags, name) is not None and not getattr(flags, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(flags, name)}: must be above 0")
    if flags.plot and not flags.plot.parent.is_dir():
        raise ValueError(f"--plot={flags.plot}: the folder {flags.plot.parent} does not exist")


def _flags() -> type:
    mode = FieldInfo(annotation=Literal["paper", "robust"] | None, default=None, description="Default: both.")
    enabled = FieldInfo(annotation=bool, default=True, description="False: fixed rates.")
    kinds: dict[str, tuple[Any, Any]] = {
        "train_iters": (int, 2000),
        "block": (int | None, None),
        "schedule": (Literal["cosine", "WSD"], "cosine"),
        "like": (Path | None, None),
        "like_ratio": (float, 1.0),
        "column": (str | None, None),
        "tag": (str | None, None),
        "noise": (tuple[float, ...], ()),
        "lengths": (tuple[float, ...], (0.5, 1.0, 2.0)),
        "initial": (tuple[float, ...], (1 / 30, 0.1, 1.0, 10.0)),
        "runs": (int, 20),
        "first_seed": (int, 0),
        "json": (bool, False),
        "plot": (Path | None, None),
    }
    fields = [
        (name, Annotated[kind, tyro.conf.arg(help=_TEXTS[name])], default)
        for name, (kind, default) in kinds.items()
    ]
    return dataclasses.make_dataclass(
        "Flags", [("adalrs", adalrs_flags({}, mode=mode, enabled=enabled)), *fields]
    )
