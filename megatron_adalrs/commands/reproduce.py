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
import shlex
import signal
import sys
import time
from collections.abc import Sequence

from megatron_adalrs.cli.program import INTERRUPTED, reports_errors
from megatron_adalrs.reproduction.cluster import CLUSTER_SCALES
from megatron_adalrs.reproduction.options import check, chosen_scale, parse
from megatron_adalrs.reproduction.plan import EXPERIMENTS, Scale

DEFAULT_EXPERIMENTS = tuple(name for name in EXPERIMENTS if name not in ("second-corpus", "larger-model"))
_PEER_MODULES = ("prodigyopt", "schedulefree")


@reports_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiments and write the report.

    Returns:
        0 if all runs are complete; 1 if some failed; 2 if a flag is not valid; 130 after Ctrl-C or SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given, __doc__)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command = f"megatron-adalrs reproduce {shlex.join(given)}"
        check(options)
        if options.scale in CLUSTER_SCALES:
            return on_cluster(options, command)
        return reproduce(options, chosen_scale(options), command)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return INTERRUPTED


def on_cluster(options: argparse.Namespace, command: str) -> int:
    """Write the launch script of a cluster scale or, with --collect, the report on its runs."""
    from megatron_adalrs.reproduction.cluster import collect_cluster, write_launch
    from megatron_adalrs.reproduction.comparison import Results
    from megatron_adalrs.reproduction.page import write_report
    from megatron_adalrs.reproduction.sections import cluster_sections

    scale = CLUSTER_SCALES[options.scale]
    changes = {
        "rates": tuple(sorted(set(options.rates or ()))),
        "schedules": tuple(dict.fromkeys(options.schedules or ())),
    }
    scale = dataclasses.replace(scale, **{name: value for name, value in changes.items() if value})
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    if not options.collect:
        script = write_launch(options.output, scale, seeds, options.data_path)
        print_now(f"{script} trains the missing runs; add --collect to this command to write the report")
        return 0
    complete, missing = collect_cluster(options.output)
    if not complete:
        raise ValueError(f"--collect: none of the {len(missing)} runs in {options.output} is complete")
    results = Results(complete)
    schedules = dict.fromkeys(result.run.schedule for result in complete)
    rates = sorted({result.run.lr for result in complete})
    sections = cluster_sections(results, scale.preset, list(schedules), rates)
    about = [f"{scale.preset}: {len(complete)} runs complete, {len(missing)} not."]
    failures = dict.fromkeys(missing, "is not complete")
    title = f"AdaLRS: the paper's experiments on {scale.preset}"
    print_now(
        f"report: {write_report(options.output, title, about, sections, complete, failures, command, True)}"
    )
    return 0


def reproduce(options: argparse.Namespace, scale: Scale, command: str) -> int:
    """Run the experiments of a scale on this machine and write the report."""
    from megatron_adalrs.reproduction import plan
    from megatron_adalrs.reproduction.comparison import Results
    from megatron_adalrs.reproduction.corpus import prepare_corpora
    from megatron_adalrs.reproduction.page import write_report
    from megatron_adalrs.reproduction.runner import Runner, lock
    from megatron_adalrs.reproduction.sections import sections_of

    experiments = possible_experiments(options.experiments)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    studies = plan.studies_of(experiments, scale)
    output, started = options.output, time.monotonic()
    with lock(output) as held:
        print_now(f"corpora in {output / 'data'}")
        prepare_corpora(output / "data", {study.corpus for study, _ in studies}, scale.corpus_mb)
        corpora = {study.name: output / "data" / study.corpus for study, _ in studies}
        runner = Runner(output, scale, corpora, options.jobs, held)
        best: dict[tuple[str, str], float] = {}
        results = Results([])
        # Runs that continue from checkpoints follow the runs that write them.
        for is_continual in (False, True):
            chosen = [(study, names) for study, names in studies if (study == plan.CONTINUAL) == is_continual]
            source = best[plan.MAIN.name, scale.schedules[0]] if is_continual and chosen else None
            grid = [
                run for study, names in chosen for run in plan.grid_runs(study, names, scale, seeds, source)
            ]
            results = Results([*results.all, *(runner.execute(grid, print_now) if grid else ())])
            for study, schedule in ((study.name, schedule) for study, names in chosen for schedule in names):
                best[study, schedule] = results.best_rate(study, schedule)
                print_now(f"best fixed rate of {study}, {schedule}: {best[study, schedule]:g}")
        rest = plan.runs_after_grid(experiments, scale, seeds, best)
        results = Results(
            {result.name: result for result in [*results.all, *runner.execute(rest, print_now)]}.values()
        )
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
    print_now(f"report: {page}")
    if runner.failures:
        print(f"error: {len(runner.failures)} runs failed; the report names them", file=sys.stderr)
    return 1 if runner.failures else 0


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
