"""Runs that are killed, checked and resumed until complete, and compared with an undisturbed run."""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_adalrs.fault_injection.attempt import RANKS, Attempt, Program
from megatron_adalrs.fault_injection.disk import (
    check_checkpoints,
    kept_losses,
    lock_holder,
    progress,
    read_folder,
)

STEPS = 60
KINDS: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"zero_stage": 0},
    "ZeRO 1, searching": {
        "zero_stage": 1,
        "adalrs": {"mode": "paper", "window": 6, "search_start": 0.25, "search_end": 0.8},
    },
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3, searching": {
        "zero_stage": 3,
        "adalrs": {"mode": "paper", "window": 6, "search_start": 0.25, "search_end": 0.8},
    },
}
DURING_SAVE = 0.85
"""Probability that a kill waits for a save; the others happen at any time of an attempt, including its
start."""
ASYNC_SAVE = 0.35
"""Probability that an attempt uses --async-save."""
DISTURBED = 0.5
"""Probability that an attempt is disturbed before it is killed."""
DISTURBANCES = ("second job", "changed flag", "rollback", "disk full")
LARGEST_FILE = 100_000
"""Bytes that a file can have on a full disk: tensors of a checkpoint take more, and records less."""
LONGEST_ATTEMPT = 180.0
"""Seconds."""
LONGEST_EXIT = 90.0
"""Seconds within which a rank must exit after the other was killed."""


@dataclass
class Figures:
    """Counts and findings of a campaign."""

    kills: int = 0
    interrupted: Counter[str] = field(default_factory=Counter)
    """Number of kills by the phase of a save that they interrupted."""
    victims: Counter[str] = field(default_factory=Counter)
    """Number of kills by the ranks that were killed."""
    with_async_save: int = 0
    """Kills of attempts with --async-save."""
    disturbances: Counter[str] = field(default_factory=Counter)
    """Number of attempts by the way in which they were disturbed."""
    runs: int = 0
    """Runs that were completed and had the losses of a run that was never killed."""
    resumed: int = 0
    """Attempts that resumed from the newest checkpoint."""
    checkpoints_read: int = 0
    """Checkpoints that were compared with their hashes, counted after every kill."""
    steps_lost: list[int] = field(default_factory=list)
    """Steps lost by each kill."""
    slowest_exit: float = 0.0
    """Longest time, in seconds, until a rank exited by itself after the other was killed."""
    wrong: list[str] = field(default_factory=list)
    """Failed checks."""

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as they are printed."""
        lost = self.steps_lost or [0]
        return {
            "kills": self.kills,
            "during_a_save": self.interrupted.total() - self.interrupted["nothing"],
            "interrupted": dict(self.interrupted),
            "victims": dict(self.victims),
            "with_async_save": self.with_async_save,
            "disturbances": dict(self.disturbances),
            "runs_completed": self.runs,
            "attempts_resumed": self.resumed,
            "checkpoints_read": self.checkpoints_read,
            "steps_lost_mean": round(statistics.mean(lost), 2),
            "steps_lost_most": max(lost),
            "slowest_exit_s": round(self.slowest_exit, 1),
            "wrong": self.wrong,
        }


class Campaign:
    """Start runs, kill and resume them until the number of kills is reached, and complete the last run.

    Args:
        output: Empty folder to work in. Runs that pass their checks are removed from it.
        program: The pretraining program that the ranks call.
        kills: Number of kills.
        seed: Seed of the random choices.
    """

    def __init__(self, output: Path, program: Program, kills: int, seed: int) -> None:
        self.figures = Figures()
        self.output = output
        self.kills = kills
        self._program = program
        self._chance = random.Random(seed)
        self._data = corpus(output / "data")
        self._ranks_output = output / "output.txt"
        self._attempt: Attempt | None = None
        self._expected: dict[str, dict[int, float]] = {}
        self._seconds_of_a_save: deque[float] = deque([0.1], maxlen=15)
        self._seconds_to_save: deque[float] = deque([4.0], maxlen=15)

    def run(self, on_kill: Callable[[Figures], None] = lambda figures: None) -> Figures:
        """Run the campaign until it is complete or a check fails.

        Args:
            on_kill: Called with the figures after every kill.
        """
        kinds = list(KINDS)
        try:
            while self.figures.kills < self.kills and not self.figures.wrong:
                self._one_run(kinds[self.figures.runs % len(kinds)], on_kill)
        finally:
            if self._attempt is not None:
                self._attempt.end()
        return self.figures

    def _one_run(self, kind: str, on_kill: Callable[[Figures], None]) -> None:
        """Start a run, and kill and resume it until it is complete."""
        figures, run = self.figures, self.output / f"run_{self.figures.runs:03d}"
        published = 0
        while True:
            before, kill = progress(run).processes, figures.kills < self.kills
            disturbance = self._disturbance(run) if kill else None
            start = self._older(run) if disturbance == "rollback" else published
            killed, seen = self._one_attempt(run, kind, kill, disturbance)
            verdict = check_checkpoints(
                run / "checkpoints", start if disturbance == "rollback" else max(published, seen)
            )
            figures.wrong += verdict.wrong
            figures.checkpoints_read += verdict.checkpoints
            done = progress(run)
            # A second job that started after the end of the first one has resumed at its end.
            if before and done.processes == before + 1:
                self._check_resume(run, done.resumed_at, start)
            published = verdict.newest
            if not killed and disturbance == "disk full" and not figures.wrong:
                continue
            if not killed:
                break
            figures.kills += 1
            figures.interrupted[verdict.interrupted or "nothing"] += 1
            figures.steps_lost.append(max(0, done.last_step - published))
            on_kill(figures)
            if figures.wrong:
                return
        if not figures.wrong:
            self._compare(run, kind)

    def _disturbance(self, run: Path) -> str | None:
        """Choose how the next attempt is disturbed; None if it is not, or if nothing is there to disturb."""
        if self._chance.random() > DISTURBED:
            return None
        chosen = self._chance.choice(DISTURBANCES)
        records = run / "metrics.jsonl"
        is_possible = {
            "second job": True,
            "changed flag": bool(self._published(run)),
            "rollback": bool(self._published(run)),
            "disk full": not records.exists() or records.stat().st_size < LARGEST_FILE // 2,
        }
        return chosen if is_possible[chosen] else None

    def _published(self, run: Path) -> list[int]:
        """Return the steps of the run's checkpoints up to the latest one."""
        from megatron_adalrs.checkpoint.latest import current_checkpoints
        from megatron_adalrs.checkpoint.manifest import step_of

        return [step_of(path) for path in current_checkpoints(run / "checkpoints")]

    def _older(self, run: Path) -> int:
        """Return the step of the oldest checkpoint, to which the run is rolled back."""
        return self._published(run)[0]

    def _start_second_job(self, run: Path, arguments: list[str], first: Attempt) -> None:
        """Start a second job in a run directory that is in use, which must be refused."""
        while lock_holder(run) != first.pid_of_first and not first.is_over and first.age < LONGEST_ATTEMPT:
            time.sleep(0.01)
        time.sleep(self._chance.random())
        second = Attempt(self._program, arguments, self._ranks_output)
        code = second.exit_of_first(LONGEST_EXIT)
        is_judged = not first.is_over
        second.end()
        if is_judged and code != 2:
            self.figures.wrong.append(f"{run}: a second job ended with exit code {code} instead of 2")

    def _try_changed_flag(self, run: Path, values: dict[str, Any]) -> None:
        """Resume with another seed, which must be refused without a change to the run."""
        files = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
        attempt = Attempt(self._program, self._arguments(run, values | {"seed": 99}), self._ranks_output)
        code = attempt.exit_of_first(LONGEST_EXIT)
        attempt.end()
        left = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
        if code != 2:
            self.figures.wrong.append(f"{run}: another seed ended with exit code {code} instead of 2")
        files.pop(run / "lock", None)  # of a killed process
        left.pop(run / "lock", None)
        if left != files:
            self.figures.wrong.append(f"{run}: another seed was refused, but the run was changed")

    def _check_resume(self, run: Path, at: int | None, published: int) -> None:
        """Check that the last attempt began at the newest checkpoint."""
        if at is None:
            return
        if at == published:
            self.figures.resumed += 1
        elif at > published:
            self.figures.wrong.append(
                f"{run} resumed from step {at}, but its newest checkpoint was of step {published}"
            )

    def _compare(self, run: Path, kind: str) -> None:
        """Check that a complete run has the losses of a run that was never killed."""
        if kind not in self._expected:
            self._expected[kind] = self._never_killed(kind)
        losses = kept_losses(run)
        if losses != self._expected[kind] or sorted(losses) != list(range(1, STEPS + 1)):
            self.figures.wrong.append(
                f"{run} ({kind}) does not have the losses of a run that was never killed"
            )
            return
        self.figures.runs += 1
        shutil.rmtree(run)

    def _never_killed(self, kind: str) -> dict[int, float]:
        run = self.output / "never_killed"
        self._one_attempt(run, kind, kill=False)
        losses = kept_losses(run)
        shutil.rmtree(run)
        return losses

    def _one_attempt(
        self, run: Path, kind: str, kill: bool, disturbance: str | None = None
    ) -> tuple[bool, int]:
        """Start or resume a run once.

        Returns:
            Whether it was killed, and the step of the newest checkpoint seen before the kill.
        """
        async_save = self._chance.random() < ASYNC_SAVE
        values = KINDS[kind] | {"async_save": async_save, "save_interval": self._chance.randint(1, 3)}
        if disturbance:
            self.figures.disturbances[disturbance] += 1
        if disturbance == "changed flag":
            self._try_changed_flag(run, values)
        if disturbance == "rollback":
            older = run / "checkpoints" / f"iter_{self._older(run):07d}"
            values |= {"load": str(older), "auto_resume": False, "keep_last": 1}
        arguments = self._arguments(run, values)
        self._ranks_output.unlink(missing_ok=True)
        limit = LARGEST_FILE if disturbance == "disk full" else None
        attempt = self._attempt = Attempt(self._program, arguments, self._ranks_output, limit)
        if disturbance == "second job":
            self._start_second_job(run, arguments, attempt)
        killed, seen = self._kill_in_time(attempt, run / "checkpoints") if kill else (False, 0)
        self.figures.with_async_save += killed and async_save
        if not killed:
            in_time = attempt.end(LONGEST_ATTEMPT)
            expected = 1 if disturbance == "disk full" else 0
            if not in_time or attempt.exit_codes != [expected] * RANKS:
                self.figures.wrong.append(
                    f"{run}: ranks that were not killed ended with {attempt.exit_codes}"
                )
        self._attempt = None
        return killed, seen

    def _kill_in_time(self, attempt: Attempt, folder: Path) -> tuple[bool, int]:
        """Kill at a random instant.

        Returns:
            False if the run was complete before, and the step of the newest checkpoint.
        """
        waits_for_a_save = self._chance.random() < DURING_SAVE
        saves_to_let_pass = self._chance.randint(0, 2)
        at = (
            None
            if waits_for_a_save
            else self._chance.random() * 1.5 * statistics.median(self._seconds_to_save)
        )
        draft, appeared = read_folder(folder).draft, 0.0  # one of the previous attempt may exist already
        while not attempt.is_over:
            now = read_folder(folder)
            if now.draft != draft:
                if draft is not None and appeared:
                    self._seconds_of_a_save.append(attempt.age - appeared)
                if now.draft is not None:
                    appeared = attempt.age
                    if waits_for_a_save and saves_to_let_pass == 0 and at is None:
                        at = appeared + self._chance.random() * 1.1 * statistics.median(
                            self._seconds_of_a_save
                        )
                        self._seconds_to_save.append(appeared)
                    saves_to_let_pass -= 1
                draft = now.draft
            if attempt.age > LONGEST_ATTEMPT:
                self.figures.wrong.append(f"{folder}: no save and no exit within {LONGEST_ATTEMPT:g} s")
                at = attempt.age
            if at is not None and attempt.age >= at:
                newest = read_folder(folder).newest
                self._kill(attempt, has_begun=bool(appeared))
                return True, newest
            time.sleep(0.0005)
        return False, read_folder(folder).newest

    def _kill(self, attempt: Attempt, has_begun: bool) -> None:
        """Kill both ranks, one shortly after the other, or only one, whose loss the other must detect."""
        first = self._chance.randrange(RANKS)
        # Before the heartbeat begins, a rank waits for the other until the timeout of a collective.
        way = self._chance.choices(("both", "one after the other", "one alone"), (5, 4, int(has_begun)))[0]
        self.figures.victims[way] += 1
        attempt.kill(first)
        if way == "one alone":
            began = time.monotonic()
            if not attempt.end(LONGEST_EXIT):
                self.figures.wrong.append(
                    f"rank {1 - first} had not exited {LONGEST_EXIT:g} s after rank {first} was killed"
                )
            self.figures.slowest_exit = max(self.figures.slowest_exit, time.monotonic() - began)
            return
        attempt.end(self._chance.random() * 0.3 if way == "one after the other" else 0.0)

    def _arguments(self, run: Path, changes: dict[str, Any]) -> list[str]:
        values = {
            "preset": "gpt2-tiny",
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "seq_length": 16,
            "vocab_size": 50,
            "data_path": str(self._data),
            "split": "8,1,1",
            "micro_batch_size": 2,
            "train_iters": STEPS,
            "lr": 1e-3,
            "eval_iters": 1,
            "hidden_dropout": 0.1,
            "run_dir": str(run),
            "auto_resume": True,
            "keep_last": 3,
            "verify_checkpoint": True,
            "heartbeat_timeout": 10.0,
            "distributed_timeout_minutes": 1.0,
        } | changes
        file = self.output / "config.yaml"
        file.write_text(yaml.safe_dump(values))
        return ["--config", str(file)]


def corpus(prefix: Path) -> Path:
    """Write 200 documents of 100 tokens that count from random starts, modulo 50, and return the prefix."""
    import numpy as np

    from megatron_adalrs.data.indexed_dataset_builder import IndexedDatasetBuilder

    chance = np.random.default_rng(0)
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for _ in range(200):
            builder.add_document((chance.integers(0, 50) + np.arange(100)) % 50)
        builder.finalize()
    return prefix
