"""Run the experiments of the AdaLRS paper, and those behind this project's own claims, at a chosen scale.

    megatron-adalrs reproduce --scale smoke --output runs/smoke        # minutes, to check the installation
    megatron-adalrs reproduce --scale tiny --output runs/reproduction  # less than an hour on two cores
    megatron-adalrs reproduce --scale 1.5b --output DIR --data-path data/corpus   # prepare runs on a cluster
    megatron-adalrs reproduce --scale 1.5b --output DIR --collect                 # report on these runs

The command builds a byte-level corpus from files that every Python installation has, trains a GPT of 40
thousand parameters at a grid of fixed learning rates, and then trains it from multiples of the best rate with
each method. It writes report.html, report.md, results.csv and results.json. Every run is a separate process,
named after its configuration; running the same command again runs only what is missing. For a cluster the
command writes the configurations and a script that launches the runs, and later collects their results.
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

from megatron_adalrs.cli.program import INTERRUPTED, reports_errors
from megatron_adalrs.reproduction.cluster import CLUSTER_SCALES
from megatron_adalrs.reproduction.plan import EXPERIMENTS, METHODS, SCALES, SCHEDULES, Scale

DEFAULT_EXPERIMENTS = tuple(name for name in EXPERIMENTS if name not in ("second-corpus", "larger-model"))
_PEER_MODULES = ("prodigyopt", "schedulefree")


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiments and write the report.

    Returns:
        0 if all runs are complete; 1 if some failed; 2 if a flag is not valid; 130 after Ctrl-C or SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command = f"megatron-adalrs reproduce {shlex.join(given)}"
        check(options)
        if options.scale in CLUSTER_SCALES:
            return on_cluster(options, command)
        return on_this_machine(options, command)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return INTERRUPTED


def on_cluster(options: argparse.Namespace, command: str) -> int:
    """Write the launch script of a cluster scale or, with --collect, the report on its runs."""
    from megatron_adalrs.reproduction.cluster import collect_cluster, write_launch
    from megatron_adalrs.reproduction.report import CLUSTER_LIMITS, Report, cluster_sections
    from megatron_adalrs.reproduction.results import Results

    scale = CLUSTER_SCALES[options.scale]
    scale = dataclasses.replace(
        scale,
        rates=tuple(sorted(set(options.rates or scale.rates))),
        schedules=tuple(dict.fromkeys(options.schedules or scale.schedules)),
    )
    if not options.collect:
        script = write_launch(options.output, scale, seeds_of(options), options.data_path)
        print_now(f"{script} trains the missing runs; add --collect to this command to write the report")
        return 0
    complete, missing = collect_cluster(options.output)
    if not complete:
        raise ValueError(f"--collect: none of the {len(missing)} runs in {options.output} is complete")
    report = Report(
        title=f"AdaLRS: the paper's experiments on {scale.preset}",
        about=[f"{scale.preset}: {len(complete)} runs complete, {len(missing)} not."],
        sections=cluster_sections(Results(complete), scale.preset),
        results=complete,
        failures=dict.fromkeys(missing, "is not complete"),
        limits=CLUSTER_LIMITS,
        command=command,
    )
    print_now(f"report: {report.write(options.output)}")
    return 0


def on_this_machine(options: argparse.Namespace, command: str) -> int:
    """Run the experiments of a scale on this machine and write the report."""
    from megatron_adalrs.reproduction.report import LOCAL_LIMITS, Report, local_sections
    from megatron_adalrs.reproduction.runner import run_experiments

    scale, seeds, started = chosen_scale(options), seeds_of(options), time.monotonic()
    experiments = possible_experiments(options.experiments)
    results, failures = run_experiments(options.output, scale, experiments, seeds, options.jobs, print_now)
    sections = local_sections(results, experiments, scale)
    report = Report(
        title="AdaLRS: the paper's experiments",
        about=[
            f"Scale {scale.name}: {scale.train_iters} steps of 512 tokens, seeds {seeds[0]} to {seeds[-1]}, "
            f"{len(results.all)} runs; {(time.monotonic() - started) / 60:.0f} minutes in this call."
        ],
        sections=sections,
        results=results.all,
        failures=failures,
        limits=LOCAL_LIMITS,
        command=command,
    )
    page = report.write(options.output)
    for section in sections:
        if "Searches" in section.table.title:
            print(f"\n{section.table.markdown()}")
    print_now(f"report: {page}")
    if failures:
        print(f"error: {len(failures)} runs failed; the report names them", file=sys.stderr)
    return 1 if failures else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    scales = [*SCALES, *CLUSTER_SCALES]
    add("--scale", choices=scales, required=True, help="length and number of the runs")
    add(
        "--output",
        metavar="DIR",
        type=Path,
        required=True,
        help="folder for the corpora, the runs and the report",
    )
    add(
        "--experiments",
        nargs="+",
        choices=EXPERIMENTS,
        metavar="NAME",
        help=f"experiments to run, from {', '.join(EXPERIMENTS)}; all include the grid; default: all but the "
        "last two",
    )
    add("--seeds", type=int, help="number of seeds of each run; default: 3, or 1 with --scale smoke")
    add(
        "--first-seed",
        type=int,
        default=10,
        help="first seed; default: 10, because 0 to 9 were used to design the robust mode",
    )
    add(
        "--initial-rates",
        nargs="+",
        metavar="RATIO",
        help="initial rates as multiples of the best fixed one, such as 1/10 or 100; default: 1/30 1/10 1 10",
    )
    add("--methods", nargs="+", choices=METHODS, help="methods to start from the initial rates; default: all")
    add("--rates", nargs="+", type=float, metavar="LR", help="fixed rates of the grid; default: nine rates")
    add(
        "--schedules",
        nargs="+",
        choices=SCHEDULES,
        help="schedules of the grid and the search; the other experiments use the first; default: both",
    )
    add("--jobs", type=int, default=os.cpu_count(), help="number of runs at a time; default: all cores")
    add("--data-path", metavar="PREFIX", help="1.5b, 7b: the data set, as for `pretrain`")
    add("--collect", action="store_true", help="1.5b, 7b: write the report on the runs that are complete")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Set the default number of seeds and check the flags.

    Raises:
        ValueError: A flag is out of range, or does not apply to the scale.
    """
    is_cluster = options.scale in CLUSTER_SCALES
    misplaced = ("experiments", "initial_rates", "methods") if is_cluster else ("data_path", "collect")
    for name in misplaced:
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')}: not with --scale {options.scale}")
    if is_cluster and bool(options.data_path) == options.collect:
        raise ValueError(f"--data-path: --scale {options.scale} needs either a data set or --collect")
    if options.seeds is None:
        options.seeds = 3 if options.scale == "tiny" else 1
    for name, least in (("seeds", 1), ("first_seed", 0), ("jobs", 1)):
        value = getattr(options, name)
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')}: {value}: at least {least} is required")
    for rate in options.rates or ():
        if not 0 < rate < float("inf"):
            raise ValueError(f"--rates: {rate:g}: a number above 0 is required")


def seeds_of(options: argparse.Namespace) -> range:
    """Return the seeds of each run."""
    return range(options.first_seed, options.first_seed + options.seeds)


def chosen_scale(options: argparse.Namespace) -> Scale:
    """Return the scale with the changes of the flags.

    Raises:
        ValueError: An initial rate is not a number above 0.
    """
    scale = SCALES[options.scale]
    if options.rates:
        scale = dataclasses.replace(scale, rates=tuple(sorted(set(options.rates))))
    if options.schedules:
        scale = dataclasses.replace(scale, schedules=tuple(dict.fromkeys(options.schedules)))
    if options.methods:
        scale = dataclasses.replace(scale, methods=tuple(dict.fromkeys(options.methods)))
    if options.initial_rates:
        scale = dataclasses.replace(scale, ratios=parse_ratios(options.initial_rates))
    return scale


def parse_ratios(texts: Sequence[str]) -> tuple[float, ...]:
    """Return numbers and fractions as floats, in ascending order.

    Raises:
        ValueError: A text is not a number above 0.
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


def possible_experiments(asked: Sequence[str] | None) -> list[str]:
    """Return the experiments of --experiments or, by default, all whose packages are installed.

    Raises:
        ValueError: A chosen experiment needs a package that is not installed.
    """
    experiments = list(asked or DEFAULT_EXPERIMENTS)
    missing = [name for name in _PEER_MODULES if importlib.util.find_spec(name) is None]
    if "peers" in experiments and missing:
        message = f"peers needs {' and '.join(missing)}: pip install 'megatron-adalrs[peers]'"
        if asked:
            raise ValueError(f"--experiments: {message}")
        print_now(f"left out: {message}")
        experiments.remove("peers")
    return experiments


def print_now(text: str) -> None:
    """Print a progress message at once."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
