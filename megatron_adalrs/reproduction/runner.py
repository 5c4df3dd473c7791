"""Running experiments on this machine: each run is a process, and complete runs are not repeated."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from megatron_adalrs.reproduction import plan, results
from megatron_adalrs.reproduction.corpus import prepare_corpora
from megatron_adalrs.reproduction.plan import PEERS, Run, Scale, run_name, run_values
from megatron_adalrs.reproduction.results import Result, Results

ROOT = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.2

Notify = Callable[[str], None]
"""Prints a progress message."""


def run_experiments(
    output: Path, scale: Scale, experiments: Sequence[str], seeds: Sequence[int], jobs: int, notify: Notify
) -> tuple[Results, dict[str, str]]:
    """Run what is missing of the experiments: first the grids of fixed rates, then what depends on them.

    Args:
        output: Folder of the corpora and runs.
        scale: Length and number of the runs.
        experiments: Names of the experiments.
        seeds: Seeds of each run.
        jobs: Number of runs at a time.
        notify: Called with progress messages.

    Returns:
        The results, and the reasons of the failed runs by name.

    Raises:
        OSError: The folder cannot be written.
        ValueError: Another process works in the folder, or no fixed rate has a finite loss.
    """
    studies = plan.studies_of(experiments, scale)
    with lock(output) as held:
        notify(f"corpora in {output / 'data'}")
        prepare_corpora(output / "data", {study.corpus for study, _ in studies}, scale.corpus_mb)
        corpora = {study.name: output / "data" / study.corpus for study, _ in studies}
        runner = Runner(output, scale, corpora, jobs, held)
        best: dict[tuple[str, str], float] = {}
        found = Results([])
        # Runs that continue from checkpoints follow the runs that write them.
        for is_continual in (False, True):
            chosen = [(study, names) for study, names in studies if (study == plan.CONTINUAL) == is_continual]
            source = best[plan.MAIN.name, scale.schedules[0]] if is_continual and chosen else None
            grid = [
                run for study, names in chosen for run in plan.grid_runs(study, names, scale, seeds, source)
            ]
            found = Results([*found.all, *(runner.execute(grid, notify) if grid else ())])
            for study, schedule in ((study.name, schedule) for study, names in chosen for schedule in names):
                best[study, schedule] = found.best_rate(study, schedule)
                notify(f"best fixed rate of {study}, {schedule}: {best[study, schedule]:g}")
        rest = plan.runs_after_grid(experiments, scale, seeds, best)
        by_name = {result.name: result for result in [*found.all, *runner.execute(rest, notify)]}
    return Results(by_name.values()), runner.failures


def lock(output: Path, patience: float = 5.0) -> IO[str]:
    """Reserve a folder for this process and the runs that it starts, until all of them have ended.

    Args:
        output: The folder; it is created if it does not exist.
        patience: Seconds to wait for other processes. Runs that were just killed may take some to end.

    Raises:
        OSError: The folder cannot be written.
        ValueError: Another process works in the folder.
    """
    output.mkdir(parents=True, exist_ok=True)
    file = (output / ".lock").open("w")
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise ValueError(
                    f"--output {output}: another reproduction works in it, or runs of an earlier one have "
                    f"not ended"
                ) from None
            time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class Job:
    """A run with its directory, configuration and command."""

    run: Run
    folder: Path
    values: dict[str, Any]
    command: tuple[str, ...]


class Runner:
    """Runs what is missing in `output`/runs.

    Args:
        output: Folder of the runs.
        scale: Length of the runs.
        corpora: Prefix of the data set by study.
        jobs: Number of runs at a time.
        held: Lock of the folder, which the runs inherit.
    """

    def __init__(
        self, output: Path, scale: Scale, corpora: Mapping[str, Path], jobs: int, held: IO[str]
    ) -> None:
        self.output = output
        self.scale = scale
        self.corpora = corpora
        self.jobs = jobs
        self._lock = held
        self.failures: dict[str, str] = {}
        """Names of the failed runs, with the reason or the last line of their output."""

    def job(self, run: Run) -> Job:
        """Return the directory, the configuration and the command of a run."""
        values = run_values(run, self.scale)
        folder = self.output / "runs" / run_name(run, values)
        values["data_path"] = str(self.corpora[run.study])
        if "finetune_from" in values:
            values["finetune_from"] = str(self.output / "runs" / values["finetune_from"])
        if run.method in PEERS:
            program = ["-m", "megatron_adalrs.reproduction.peers", "--optimizer", run.method]
        else:
            program = ["-m", "megatron_adalrs.commands.pretrain"]
        command = ("python", *program, "--config", str(folder / "run.yaml"), "--run-dir", str(folder))
        return Job(run, folder, values, command)

    def execute(self, runs: Sequence[Run], notify: Notify) -> list[Result]:
        """Run what is missing and return the results of all runs that succeeded, in order."""
        jobs = [self.job(run) for run in runs]
        waiting = [job for job in jobs if not (job.folder / "result.json").exists()]
        notify(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them complete; {self.jobs} at a time")
        running: dict[subprocess.Popen[bytes], Job] = {}
        done, started = 0, time.monotonic()
        total = len(waiting)
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    job = waiting.pop(0)
                    if not results.is_complete(job.folder):
                        running[self._start(job)] = job
                    else:
                        done += 1
                        self._end(job, 0)
                for process in [process for process in running if process.poll() is not None]:
                    job = running.pop(process)
                    done += 1
                    outcome = self._end(job, process.returncode)
                    left = (time.monotonic() - started) / done * (total - done) / 60
                    notify(f"[{done}/{total}, about {left:.0f} min left] {job.folder.name}: {outcome}")
                time.sleep(_POLL_SECONDS if running else 0)
        finally:
            for process in running:
                process.kill()
                process.wait()
        files = [job.folder / "result.json" for job in jobs]
        return [results.load(file) for file in files if file.exists()]

    def _start(self, job: Job) -> subprocess.Popen[bytes]:
        """Start a run from its first step; files of an earlier attempt are removed."""
        shutil.rmtree(job.folder, ignore_errors=True)
        job.folder.mkdir(parents=True)
        (job.folder / "run.yaml").write_text(yaml.safe_dump(job.values, sort_keys=False))
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            environment.pop(name, None)
        with (job.folder / "output.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, *job.command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[self._lock.fileno()],
            )

    def _end(self, job: Job, code: int) -> str:
        """Store the result or the failure of a run and return a summary of it."""
        if code == 0:
            try:
                result = results.collect(job.run, job.folder, shlex.join(job.command))
                return f"validation loss {result.valid:.4f}, {result.wall_seconds:.0f} s"
            except (OSError, ValueError) as error:
                self.failures[job.folder.name] = str(error)
        else:
            lines = (job.folder / "output.log").read_text(errors="replace").strip().splitlines()
            self.failures[job.folder.name] = f"exit code {code}: {lines[-1] if lines else 'no output'}"
        return f"failed, {self.failures[job.folder.name]}"
