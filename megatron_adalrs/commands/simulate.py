"""Simulate searches on a model of the loss whose best learning rate is known.

    megatron-adalrs simulate                                   # a run like the tiny GPT of `reproduce`
    megatron-adalrs simulate --like runs/fixed --train-iters 20000   # noise and descent of a recorded loss
    megatron-adalrs simulate --adalrs.mode robust --noise 0.17 --initial 1 --plot simulation.html

The results show how noise, trial lengths and the initial rate affect the search. They help to plan a run, but
are not evidence about real runs. The model is described in megatron_adalrs/analysis/simulate.py.
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

from megatron_adalrs.adalrs.settings import AdaLRSSettings, uses_setting
from megatron_adalrs.cli.arguments import adalrs_flags
from megatron_adalrs.cli.program import parse_flags, reports_errors

_TEXTS = {
    "train_iters": "Steps of a run.",
    "block": "Steps that are simulated together, by their mean. Default: chosen for at most 2000 blocks.",
    "schedule": "Shape of the schedule after a warm-up over 3 % of the run. cosine: decay to a tenth of the "
    "rate. WSD: constant, then linear decay to a tenth over the last fifth.",
    "like": "Recorded loss (as for `replay`) from which noise and descent are estimated.",
    "like_ratio": "Base rate of the recorded run relative to the rate of fastest descent, which a record "
    "cannot show.",
    "column": "Column or key of the recorded loss.",
    "tag": "TensorBoard tag of the recorded loss.",
    "noise": "Standard deviations of the loss of a step, in nats. Default: 1/4, 1 and 4 times that of the "
    "recorded loss, or of 0.17; this corresponds to batches of 16, 1 and 1/16 times the size.",
    "lengths": "Lengths of the windows or races, relative to their defaults for this run.",
    "initial": "Initial rates, relative to the best fixed rate.",
    "runs": "Runs of each combination, with consecutive seeds starting at first_seed.",
    "first_seed": "First seed.",
    "json": "Print every mean as a JSON object.",
    "plot": "HTML file for a plot of the probability of ending within a factor of 2 of the best rate.",
}


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate the searches and print a summary.

    Returns:
        0, or 2 if a flag is not valid or the recorded loss cannot be read.
    """
    flags: Any = parse_flags(_flags(), __doc__, arguments)
    from megatron_adalrs.analysis.simulation_study import Study, surface_of
    from megatron_adalrs.analysis.simulation_tables import plot, print_study

    check(flags)
    modes = [flags.adalrs.mode] if flags.adalrs.mode else ["paper", "robust"]
    given = vars(flags.adalrs)
    settings = [
        AdaLRSSettings(
            **{name: value for name, value in given.items() if flags.adalrs.mode or uses_setting(mode, name)}
            | {"mode": mode}
        )
        for mode in modes
    ]
    surface = surface_of(flags.like, flags.column, flags.tag, flags.schedule, flags.like_ratio)
    noises = flags.noise or [surface.noise / 4, surface.noise, surface.noise * 4]
    started = time.perf_counter()
    study = Study(surface, flags.schedule, flags.train_iters, flags.block or -(-flags.train_iters // 2000))
    seeds = range(flags.first_seed, flags.first_seed + flags.runs)
    cells = [
        cell for one in settings for cell in study.cells(one, noises, flags.lengths, flags.initial, seeds)
    ]
    seconds = time.perf_counter() - started
    if flags.plot:
        plot(flags.plot, cells)
    if flags.json:
        content = {
            "surface": dataclasses.asdict(surface),
            "cells": [dataclasses.asdict(cell) for cell in cells],
            "train_iters": flags.train_iters,
            "schedule": flags.schedule,
            "seconds": seconds,
        }
        print(json.dumps(content))
    else:
        print_study(study, cells, len(seeds), seconds)
    return 0


def check(flags: Any) -> None:
    """Check the ranges of the flags.

    Raises:
        ValueError: The first flag that is out of its range.
    """
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
    return dataclasses.make_dataclass("Flags", [("adalrs", adalrs_flags({}, mode=mode)), *fields])


if __name__ == "__main__":
    sys.exit(main())
