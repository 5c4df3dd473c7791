"""The campaign: runs that are killed, judged and resumed until complete, then compared with one that was not killed."""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_adalrs.fault_injection.disk import glance, judge, kept_losses, progress
from megatron_adalrs.fault_injection.lives import RANKS, Life

STEPS = 60
KINDS: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"zero_stage": 0},
    "ZeRO 1, searching": {
        "zero_stage": 1,
        "adalrs": {"enabled": True, "window": 6, "search_start": 0.25, "search_end": 0.8},
    },
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3, searching": {
        "zero_stage": 3,
        "adalrs": {"enabled": True, "window": 6, "search_start": 0.25, "search_end": 0.8},
    },
}
SAVING = 0.85
"""Share of the kills that wait for a save; the others come at any instant of a life, its start included."""
BESIDE = 0.35
"""Share of the lives with --async-save."""
LONGEST_LIFE = 180.0
LEAVING = 90.0
"""Seconds within which a rank must have left when the other was killed."""


@dataclass
class Figures:
    """What came of it."""

    kills: int = 0
    interrupted: Counter[str] = field(default_factory=Counter)
    """Kills by what they cut short."""
    victims: Counter[str] = field(default_factory=Counter)
    """Kills by who was killed."""
    beside: int = 0
    """Kills of lives with --async-save."""
    runs: int = 0
    """Completed, and compared with one that was never killed."""
    resumed: int = 0
    """Lives that were seen to go on from the newest checkpoint."""
    checkpoints_read: int = 0
    """Checkpoints that were compared with their hashes, after every kill anew."""
    steps_lost: list[int] = field(default_factory=list)
    """By each kill."""
    slowest_leave: float = 0.0
    """Seconds until a rank left by itself whose peer was killed."""
    wrong: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        lost = self.steps_lost or [0]
        return {
            "kills": self.kills, "during_a_save": self.interrupted.total() - self.interrupted["nothing"],
            "cut_short": dict(self.interrupted), "victims": dict(self.victims), "with_async_save": self.beside,
            "runs_completed": self.runs, "lives_resumed": self.resumed, "checkpoints_read": self.checkpoints_read,
            "steps_lost_mean": round(statistics.mean(lost), 2), "steps_lost_most": max(lost),
            "slowest_leave_s": round(self.slowest_leave, 1), "wrong": self.wrong,
        }  # fmt: skip


class Campaign:
    """Kills runs until there were enough deaths; the last run is then completed.

    Args:
        output: an empty folder; runs are removed from it once they are found to be right.
    """

    def __init__(self, output: Path, kills: int, seed: int) -> None:
        self.figures = Figures()
        self.output, self.kills = output, kills
        self._chance = random.Random(seed)
        self._data = corpus(output / "data")
        self._said = output / "said.txt"
        self._life: Life | None = None
        self._expected: dict[str, dict[int, float]] = {}
        self._seconds_of_a_save: deque[float] = deque([0.1], maxlen=15)
        self._seconds_to_save: deque[float] = deque([4.0], maxlen=15)

    def run(self, tell: Any = lambda figures: None) -> Figures:
        """`tell` is given the figures after every kill."""
        kinds = list(KINDS)
        try:
            while self.figures.kills < self.kills and not self.figures.wrong:
                self._one_run(kinds[self.figures.runs % len(kinds)], tell)
        finally:
            if self._life is not None:
                self._life.end()
        return self.figures

    def _one_run(self, kind: str, tell: Any) -> None:
        """From its start, through its deaths, to its end."""
        figures, run = self.figures, self.output / f"run_{self.figures.runs:03d}"
        published = 0
        while True:
            killed, seen = self._live(run, kind, kill=figures.kills < self.kills)
            verdict = judge(run / "checkpoints", max(published, seen))
            figures.wrong += verdict.wrong
            figures.checkpoints_read += verdict.checkpoints
            done = progress(run)
            self._check_resume(run, done.resumed_at, published, is_first=done.processes < 2)
            published = verdict.newest
            if not killed:
                break
            figures.kills += 1
            figures.interrupted[verdict.interrupted or "nothing"] += 1
            figures.steps_lost.append(max(0, done.last_step - published))
            tell(figures)
            if figures.wrong:
                return
        if not figures.wrong:
            self._compare(run, kind)

    def _check_resume(self, run: Path, at: int | None, published: int, is_first: bool) -> None:
        """The process that was seen to begin last must have begun with the newest checkpoint there was."""
        if at is None or is_first:
            return
        if at == published:
            self.figures.resumed += 1
        elif at > published:
            self.figures.wrong.append(
                f"{run} went on from step {at}, and its newest checkpoint was {published}"
            )

    def _compare(self, run: Path, kind: str) -> None:
        if kind not in self._expected:
            self._expected[kind] = self._never_killed(kind)
        losses = kept_losses(run)
        if losses != self._expected[kind] or sorted(losses) != list(range(1, STEPS + 1)):
            self.figures.wrong.append(f"{run} ({kind}) has other losses than a run that was never killed")
            return
        self.figures.runs += 1
        shutil.rmtree(run)

    def _never_killed(self, kind: str) -> dict[int, float]:
        run = self.output / "never_killed"
        self._live(run, kind, kill=False)
        losses = kept_losses(run)
        shutil.rmtree(run)
        return losses

    def _live(self, run: Path, kind: str, kill: bool) -> tuple[bool, int]:
        """One life. Returns whether it was killed, and the newest step seen published before."""
        beside = self._chance.random() < BESIDE
        values = KINDS[kind] | {"async_save": beside, "save_interval": self._chance.randint(1, 3)}
        life = self._life = Life(self._arguments(run, values), self._said)
        killed, seen = self._kill_in_time(life, run / "checkpoints") if kill else (False, 0)
        self.figures.beside += killed and beside
        if not killed:
            in_time = life.end(LONGEST_LIFE)
            if not in_time or life.exit_codes != [0] * RANKS:
                self.figures.wrong.append(f"{run}: ranks that were not killed ended with {life.exit_codes}")
        self._life = None
        return killed, seen

    def _kill_in_time(self, life: Life, folder: Path) -> tuple[bool, int]:
        """Kill at the instant that was drawn; False: the run was complete before."""
        waits_for_a_save = self._chance.random() < SAVING
        saves_to_let_pass = self._chance.randint(0, 2)
        at = (
            None
            if waits_for_a_save
            else self._chance.random() * 1.5 * statistics.median(self._seconds_to_save)
        )
        draft, appeared = glance(folder).draft, 0.0  # one there already is of the life before
        while not life.is_over:
            now = glance(folder)
            if now.draft != draft:
                if draft is not None and appeared:
                    self._seconds_of_a_save.append(life.age - appeared)
                if now.draft is not None:
                    appeared = life.age
                    if waits_for_a_save and saves_to_let_pass == 0 and at is None:
                        at = appeared + self._chance.random() * 1.1 * statistics.median(
                            self._seconds_of_a_save
                        )
                        self._seconds_to_save.append(appeared)
                    saves_to_let_pass -= 1
                draft = now.draft
            if life.age > LONGEST_LIFE:
                self.figures.wrong.append(
                    f"{folder}: a life of {LONGEST_LIFE:g} s came to no save and no end"
                )
                at = life.age
            if at is not None and life.age >= at:
                newest = glance(folder).newest
                self._kill(life, has_begun=bool(appeared))
                return True, newest
            time.sleep(0.0005)
        return False, glance(folder).newest

    def _kill(self, life: Life, has_begun: bool) -> None:
        """Both ranks, one soon after the other, or one alone, which the other must notice by itself."""
        first = self._chance.randrange(RANKS)
        # In its very first seconds a rank waits for its peers as long as collectives may last.
        way = self._chance.choices(("both", "one after the other", "one alone"), (5, 4, int(has_begun)))[0]
        self.figures.victims[way] += 1
        life.kill(first)
        if way == "one alone":
            began = time.monotonic()
            if not life.end(LEAVING):
                self.figures.wrong.append(
                    f"rank {1 - first} had not left {LEAVING:g} s after rank {first} was killed"
                )
            self.figures.slowest_leave = max(self.figures.slowest_leave, time.monotonic() - began)
            return
        life.end(self._chance.random() * 0.3 if way == "one after the other" else 0.0)

    def _arguments(self, run: Path, changes: dict[str, Any]) -> list[str]:
        values = {
            "preset": "gpt2-tiny", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 16,
            "vocab_size": 50, "data_path": str(self._data), "split": "8,1,1", "micro_batch_size": 2,
            "train_iters": STEPS, "lr": 1e-3, "eval_iters": 1, "hidden_dropout": 0.1, "run_dir": str(run),
            "auto_resume": True, "keep_last": 3, "verify_checkpoint": True, "heartbeat_timeout": 10.0,
            "distributed_timeout_minutes": 1.0,
        } | changes  # fmt: skip
        file = self.output / "config.yaml"
        file.write_text(yaml.safe_dump(values))
        return ["--config", str(file)]


def corpus(prefix: Path) -> Path:
    """200 documents of 100 tokens that count from random starts, modulo 50. Returns the prefix."""
    import numpy as np

    from megatron_adalrs.data.indexed_dataset import IndexedDatasetBuilder

    chance = np.random.default_rng(0)
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for _ in range(200):
            builder.add_document((chance.integers(0, 50) + np.arange(100)) % 50)
        builder.finalize()
    return prefix
