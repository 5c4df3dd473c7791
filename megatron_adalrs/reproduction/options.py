"""Command line of `megatron-adalrs reproduce`: its flags, their checks, and the scale that they make."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from megatron_adalrs.reproduction.cluster import CLUSTER_SCALES
from megatron_adalrs.reproduction.plan import EXPERIMENTS, METHODS, SCALES, SCHEDULES, Scale


def parse(arguments: Sequence[str], description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scale", choices=[*SCALES, *CLUSTER_SCALES], required=True, help="length and number of the runs"
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="folder of corpora, runs and report"
    )
    parser.add_argument(
        "--experiments",
        nargs="+",
        choices=EXPERIMENTS,
        metavar="NAME",
        help=f"of {', '.join(EXPERIMENTS)}; all build on the grid; default: all but the last two",
    )
    parser.add_argument("--seeds", type=int, help="seeds of each run; default: 3, or 1 at --scale smoke")
    parser.add_argument(
        "--first-seed",
        type=int,
        default=10,
        help="default: 10; 0 to 9 were used in designing the robust mode",
    )
    parser.add_argument(
        "--initial-rates",
        nargs="+",
        metavar="RATIO",
        help="over the best fixed rate, such as 1/10 or 100; default: 1/30 1/10 1 10",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        help="what trains from the initial rates; default: all three",
    )
    parser.add_argument(
        "--rates", nargs="+", type=float, metavar="LR", help="fixed rates of the grid; default: nine"
    )
    parser.add_argument(
        "--schedules", nargs="+", choices=SCHEDULES, help="default: both; the first serves for the rest"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; default: the cores")
    parser.add_argument("--data-path", metavar="PREFIX", help="1.5b, 7b: the corpus, as for `pretrain`")
    parser.add_argument(
        "--collect", action="store_true", help="1.5b, 7b: write the report on the runs that are complete"
    )
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Fill in the number of seeds, and refuse what does not fit together.

    Raises:
        ValueError: a flag is out of its range, or not one of this scale.
    """
    is_cluster = options.scale in CLUSTER_SCALES
    misplaced = ("experiments", "initial_rates", "methods") if is_cluster else ("data_path", "collect")
    for name in misplaced:
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')}: not with --scale {options.scale}")
    if is_cluster and bool(options.data_path) == options.collect:
        raise ValueError(f"--data-path: --scale {options.scale} needs either a corpus or --collect")
    if options.seeds is None:
        options.seeds = 3 if options.scale == "tiny" else 1
    for name, least in (("seeds", 1), ("first_seed", 0), ("jobs", 1)):
        value = getattr(options, name)
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')}: {value}: at least {least} is required")
    for rate in options.rates or ():
        if not 0 < rate < float("inf"):
            raise ValueError(f"--rates: {rate:g}: a number above 0 is required")


def chosen_scale(options: argparse.Namespace) -> Scale:
    """The scale with what the flags change.

    Raises:
        ValueError: an initial rate is not a number above 0.
    """
    scale = SCALES[options.scale]
    if options.rates:
        scale = dataclasses.replace(scale, rates=tuple(sorted(set(options.rates))))
    if options.schedules:
        scale = dataclasses.replace(scale, schedules=tuple(dict.fromkeys(options.schedules)))
    if options.methods:
        scale = dataclasses.replace(scale, methods=tuple(dict.fromkeys(options.methods)))
    if options.initial_rates:
        scale = dataclasses.replace(scale, ratios=parsed_ratios(options.initial_rates))
    return scale


def parsed_ratios(texts: Sequence[str]) -> tuple[float, ...]:
    """Numbers or fractions, in order.

    Raises:
        ValueError: one is neither, or not above 0.
    """
    ratios = []
    for text in texts:
        try:
            ratio = float(Fraction(text))
        except (ValueError, ZeroDivisionError):
            raise ValueError(
                f"--initial-rates: {text!r}: a number or a fraction such as 1/10 is required"
            ) from None
        if not 0 < ratio < float("inf"):
            raise ValueError(f"--initial-rates: {text}: a number above 0 is required")
        ratios.append(ratio)
    return tuple(sorted(set(ratios)))
