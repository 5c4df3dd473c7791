"""Run the experiments of the AdaLRS paper, and this project's own claims, at a scale of your choice.

    python tools/reproduce_paper.py --scale smoke --output runs/smoke        # minutes: does it all work here?
    python tools/reproduce_paper.py --scale tiny --output runs/reproduction  # under an hour on two cores
    python tools/reproduce_paper.py --scale 1.5b --output /shared/reproduction --data-path data/corpus   # for a cluster
    python tools/reproduce_paper.py --scale 1.5b --output /shared/reproduction --collect                 # its report

Makes a byte-level corpus from what Python brings along, trains a GPT of 40 thousand parameters at a grid of fixed
rates, then from multiples of the best one with each mode, and writes report.html, report.md, results.csv and
results.json. Every run is a process of its own and its name is its configuration: the same command again runs only what
is missing. On a cluster it writes the configurations and a script that launches them, and later collects what they
left.
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

from megatron_adalrs.reproduction.cluster import CLUSTER_SCALES
from megatron_adalrs.reproduction.options import check, chosen_scale, parse
from megatron_adalrs.reproduction.plan import EXPERIMENTS, Scale

DEFAULT_EXPERIMENTS = tuple(name for name in EXPERIMENTS if name not in ("second-corpus", "larger-model"))
_PEER_MODULES = ("prodigyopt", "schedulefree")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 all runs are complete, 1 some failed, 2 it was asked for something impossible, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given, __doc__)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command = f"python tools/reproduce_paper.py {shlex.join(given)}"
        check(options)
        if options.scale in CLUSTER_SCALES:
            return on_cluster(options, command)
        return reproduce(options, chosen_scale(options), command)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with what is missing", file=sys.stderr)
        return 130


def on_cluster(options: argparse.Namespace, command: str) -> int:
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
        tell(f"{script} trains what is not complete; the report comes from the same command with --collect")
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
    tell(f"report: {write_report(options.output, title, about, sections, complete, failures, command, True)}")
    return 0


def reproduce(options: argparse.Namespace, scale: Scale, command: str) -> int:
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
        tell(f"corpora in {output / 'data'}")
        prepare_corpora(output / "data", {study.corpus for study, _ in studies}, scale.corpus_mb)
        corpora = {study.name: output / "data" / study.corpus for study, _ in studies}
        runner = Runner(output, scale, corpora, options.jobs, held)
        best: dict[tuple[str, str], float] = {}
        results = Results([])
        # What goes on from checkpoints waits for the runs that leave them.
        for is_continual in (False, True):
            chosen = [(study, names) for study, names in studies if (study == plan.CONTINUAL) == is_continual]
            source = best[plan.MAIN.name, scale.schedules[0]] if is_continual and chosen else None
            grid = [
                run for study, names in chosen for run in plan.grid_runs(study, names, scale, seeds, source)
            ]
            results = Results([*results.all, *(runner.execute(grid, tell) if grid else ())])
            for study, schedule in ((study.name, schedule) for study, names in chosen for schedule in names):
                best[study, schedule] = results.best_rate(study, schedule)
                tell(f"best fixed rate of {study}, {schedule}: {best[study, schedule]:g}")
        rest = plan.runs_after_grid(experiments, scale, seeds, best)
        results = Results(
            {result.name: result for result in [*results.all, *runner.execute(rest, tell)]}.values()
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
    missing = [name for name in _PEER_MODULES if importlib.util.find_spec(name) is None]
    if "peers" in experiments and missing:
        message = f"peers needs {' and '.join(missing)}: pip install 'megatron-adalrs[peers]'"
        if asked:
            raise ValueError(f"--experiments: {message}")
        tell(f"left out: {message}")
        experiments.remove("peers")
    return experiments


def tell(text: str) -> None:
    print(text, flush=True)
