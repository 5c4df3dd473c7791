#!/usr/bin/env python3
"""Run the experiments of the AdaLRS paper, and this project's own claims, at a scale of your choice.

    python tools/reproduce_paper.py --scale smoke --output runs/smoke        # minutes: does it all work here?
    python tools/reproduce_paper.py --scale tiny --output runs/reproduction  # under an hour on two cores

Makes a byte-level corpus from what Python brings along, trains a GPT of 40 thousand parameters at a grid of fixed
rates, then from multiples of the best one with each mode, and writes report.html, report.md, results.csv and
results.json. Every run is a process of its own and its name is its configuration: the same command again runs only what
is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from reproduction.plan import EXPERIMENTS, PEERS, SCALES, SCHEDULES, Scale

DEFAULT_EXPERIMENTS = tuple(name for name in EXPERIMENTS if name not in ("second-corpus", "larger-model"))
_PEER_MODULES = {"prodigy": "prodigyopt", "schedulefree": "schedulefree"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 all runs are complete, 1 some failed, 2 it was asked for something impossible, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        scale = chosen_scale(options)
        return reproduce(options, scale, f"python tools/reproduce_paper.py {shlex.join(given)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with what is missing", file=sys.stderr)
        return 130


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=[*SCALES], required=True, help="length and number of the runs")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder of corpora, runs and report")
    parser.add_argument(
        "--experiments", nargs="+", choices=EXPERIMENTS, metavar="NAME",
        help=f"of {', '.join(EXPERIMENTS)}; all build on the grid; default: all but the last two",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, help="seeds of each run; default: 3, or 1 at --scale smoke")
    parser.add_argument(
        "--first-seed", type=int, default=10, help="default: 10; 0 to 9 were used in designing the robust mode"
    )
    parser.add_argument(
        "--initial-rates", nargs="+", metavar="RATIO",
        help="over the best fixed rate, such as 1/10 or 100; default: 1/30 1/10 1 10",
    )  # fmt: skip
    parser.add_argument("--rates", nargs="+", type=float, metavar="LR", help="fixed rates of the grid; default: nine")
    parser.add_argument(
        "--schedules", nargs="+", choices=SCHEDULES, help="default: both; the first serves for the rest"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; default: the cores")
    return parser.parse_args(arguments)


def chosen_scale(options: argparse.Namespace) -> Scale:
    """The scale with what the flags change.

    Raises:
        ValueError: a flag is out of its range.
    """
    scale = SCALES[options.scale]
    if options.seeds is None:
        options.seeds = 1 if options.scale == "smoke" else 3
    for name, least in (("seeds", 1), ("first_seed", 0), ("jobs", 1)):
        value = getattr(options, name)
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')}: {value}: at least {least} is required")
    for rate in options.rates or ():
        if not 0 < rate < float("inf"):
            raise ValueError(f"--rates: {rate:g}: a number above 0 is required")
    if options.rates:
        scale = dataclasses.replace(scale, rates=tuple(sorted(set(options.rates))))
    if options.schedules:
        scale = dataclasses.replace(scale, schedules=tuple(dict.fromkeys(options.schedules)))
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
            raise ValueError(f"--initial-rates: {text!r}: a number or a fraction such as 1/10 is required") from None
        if not 0 < ratio < float("inf"):
            raise ValueError(f"--initial-rates: {text}: a number above 0 is required")
        ratios.append(ratio)
    return tuple(sorted(set(ratios)))


def reproduce(options: argparse.Namespace, scale: Scale, command: str) -> int:
    from reproduction import plan
    from reproduction.corpus import prepare_corpora
    from reproduction.page import write_report
    from reproduction.runner import Runner, lock
    from reproduction.sections import sections_of
    from reproduction.tables import Results

    experiments = possible_experiments(options.experiments)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    studies = plan.studies_of(experiments, scale)
    output, started = options.output, time.monotonic()
    with lock(output) as held:
        tell(f"corpora in {output / 'data'}")
        prepare_corpora(output / "data", {study.corpus for study, _ in studies}, scale.corpus_mb)
        corpora = {study.name: output / "data" / study.corpus for study, _ in studies}
        runner = Runner(output, scale, corpora, options.jobs, held)
        grid = [run for study, names in studies for run in plan.grid_runs(study, names, scale, seeds)]
        results = Results(runner.execute(grid, tell))
        best = {
            (study.name, schedule): results.best_rate(study.name, schedule, scale.rates)
            for study, schedules in studies
            for schedule in schedules
        }
        for (study, schedule), rate in best.items():
            tell(f"best fixed rate of {study}, {schedule}: {rate:g}")
        rest = plan.runs_after_grid(experiments, scale, seeds, best)
        results = Results({result.name: result for result in [*results.all, *runner.execute(rest, tell)]}.values())
        about = [
            f"Scale {scale.name}: {scale.train_iters} steps of 512 tokens, seeds {seeds[0]} to {seeds[-1]}, "
            f"{len(results.all)} runs; {(time.monotonic() - started) / 60:.0f} minutes in this call."
        ]
        sections = sections_of(results, experiments, scale)
        page = write_report(
            output, "AdaLRS: the paper's experiments", about, sections, results.all, runner.failures, command
        )
    for section in sections:
        if "Searches" in section.table.title:
            print(f"\n{section.table.markdown()}")
    tell(f"report: {page}")
    if runner.failures:
        print(f"error: {len(runner.failures)} runs failed; the report names them", file=sys.stderr)
    return 1 if runner.failures else 0


def possible_experiments(asked: Sequence[str] | None) -> list[str]:
    """The experiments that were asked for, or all that can be run here.

    Raises:
        ValueError: a package that one of those asked for needs is missing.
    """
    experiments = list(asked or DEFAULT_EXPERIMENTS)
    missing = [_PEER_MODULES[name] for name in PEERS if importlib.util.find_spec(_PEER_MODULES[name]) is None]
    if "peers" in experiments and missing:
        message = f"peers needs {' and '.join(missing)}: pip install 'megatron-adalrs[peers]'"
        if asked:
            raise ValueError(f"--experiments: {message}")
        tell(f"left out: {message}")
        experiments.remove("peers")
    return experiments


def tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
