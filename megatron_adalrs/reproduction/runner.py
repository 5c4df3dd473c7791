"""Runs in processes of their own, as many at a time as there are jobs; what is complete is never run
again."""

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
from typing import IO

import yaml

from megatron_adalrs.reproduction import results
from megatron_adalrs.reproduction.plan import PEERS, Run, Scale, run_name, run_values
from megatron_adalrs.reproduction.results import Result

ROOT = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.2


def lock(output: Path, patience: float = 5.0) -> IO[str]:
    """Make `output` this process's own, and that of the runs that it starts, until they have all ended.

    Args:
        patience: seconds to wait for it; runs that were just killed may take some to end.

    Raises:
        OSError: it cannot be written.
        ValueError: another process works in it.
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
                    f"--output {output}: another reproduction works in it, or runs that it left behind have "
                    f"not ended"
                ) from None
            time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class Job:
    """A run, its directory and its command."""

    run: Run
    folder: Path
    values: dict
    command: tuple[str, ...]


class Runner:
    """Runs what is missing in `output`/runs."""

    def __init__(
        self, output: Path, scale: Scale, corpora: Mapping[str, Path], jobs: int, held: IO[str]
    ) -> None:
        self.output, self.scale, self.corpora, self.jobs, self._lock = output, scale, corpora, jobs, held
        self.failures: dict[str, str] = {}
        """Names of runs that ended badly, and the last line of what they printed."""

    def job(self, run: Run) -> Job:
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

    def execute(self, runs: Sequence[Run], tell: Callable[[str], None]) -> list[Result]:
        """The results of all runs that succeed, those that were complete already included, in order."""
        jobs = [self.job(run) for run in runs]
        waiting = [job for job in jobs if not (job.folder / "result.json").exists()]
        tell(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them complete; {self.jobs} at a time")
        running: dict[subprocess.Popen, Job] = {}
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
                    tell(f"[{done}/{total}, about {left:.0f} min left] {job.folder.name}: {outcome}")
                time.sleep(_POLL_SECONDS if running else 0)
        finally:
            for process in running:
                process.kill()
                process.wait()
        files = [job.folder / "result.json" for job in jobs]
        return [results.load(file) for file in files if file.exists()]

    def _start(self, job: Job) -> subprocess.Popen:
        """Begin a run from its first step; what an earlier attempt left is removed."""
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
        """Keep the result; what to say about it."""
        if code == 0:
            try:
                result = results.collect(job.run, job.folder, shlex.join(job.command))
                return f"validation loss {result.valid:.4f}, {result.wall_seconds:.0f} s"
            except (OSError, ValueError) as error:
                self.failures[job.folder.name] = str(error)
        else:
            lines = (job.folder / "output.log").read_text(errors="replace").strip().splitlines()
            self.failures[job.folder.name] = (
                f"exit code {code}: {lines[-1] if lines else 'nothing was printed'}"
            )
        return f"failed, {self.failures[job.folder.name]}"
