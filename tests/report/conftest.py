"""A made-up run: its loss falls faster at a better learning rate, and an AdaLRS search finds one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

TOKENS = 4096
SECONDS = 0.05
BASE_RATE = 1e-4
BEST_RATE = 1e-3


class SyntheticRun:
    """Writes the files of a run as training goes on; `scale` and the position are as in a real one."""

    def __init__(self, path: Path, steps: int, seed: int) -> None:
        path.mkdir(parents=True)
        self.path, self.steps = path, steps
        self.random = np.random.default_rng(seed)
        self.metrics: list[dict[str, Any]] = []
        self.decisions: list[dict[str, Any]] = []
        self.step = self.total_steps = self.discarded_tokens = 0
        self.progress = 0.0
        self.scale = 1.0
        self.time = 1.7e9
        self.bad_losses: dict[int, float] = {}

    def event(self, event: str, **extra: Any) -> None:
        self._metric(kind="run", event=event, **extra)

    def train(self, count: int, phase: str = "watch") -> None:
        for _ in range(count):
            self.step, self.total_steps, self.time = self.step + 1, self.total_steps + 1, self.time + SECONDS
            factor = min(1.0, self.step / (0.03 * self.steps)) * (1 - 0.9 * self.step / self.steps)
            lr = BASE_RATE * factor * self.scale
            self.progress += np.exp(-0.25 * np.log(max(lr, 1e-9) / BEST_RATE) ** 2)
            loss = 3 + 5 * np.exp(-self.progress / (0.2 * self.steps)) + 3 / (1 + self.step / 20)
            loss += self.random.normal(0, 0.08)
            self._metric(
                kind="train",
                loss=self.bad_losses.get(self.step, float(loss)),
                lr=lr,
                scale=self.scale,
                phase=phase,
                grad_norm=float(self.random.lognormal(-0.5, 0.2)),
                applied=True,
                tokens_per_second=TOKENS / SECONDS * float(self.random.normal(1, 0.04)),
                flops_per_second=2.1e11,
                seconds=SECONDS,
                memory_bytes=None,
                consumed_tokens=self.step * TOKENS,
                discarded_tokens=self.discarded_tokens,
            )

    def evaluate(self, split: str = "valid") -> None:
        loss = 3.05 + 5 * float(np.exp(-self.progress / (0.2 * self.steps)))
        self._metric(kind="eval", split=split, loss=loss, perplexity=float(np.exp(loss)))

    def consume(self, **tokens: int) -> None:
        """Of each corpus, by its name; an epoch has 10,000 tokens."""
        corpora = [
            {"name": name, "samples": n // 8, "tokens": n, "epochs": n / 10_000} for name, n in tokens.items()
        ]
        self._metric(kind="corpora", corpora=corpora)

    def decide(self, event: str, scale_after: float | None = None, **fields: Any) -> None:
        before, self.scale = self.scale, self.scale if scale_after is None else scale_after
        position = {"step": self.step, "total_steps": self.total_steps, "time": self.time}
        scales = {"scale_before": before, "scale_after": self.scale}
        self.decisions.append(
            {"event": event, **position, **scales, "discarded_steps": 0, "reason": ""} | fields
        )

    def trial(self, length: int, factor: float, verdict: str, scale_after: float, **fields: Any) -> None:
        start, progress, before = self.step, self.progress, self.scale
        reason = f"this window is slower than the last one: trying {factor:g} x the rate"
        self.decide("trial_started", before * factor, reason=reason, snapshot_seconds=0.04, capture="trial")
        self.train(length, "trial")
        if verdict != "accepted":
            self.step, self.progress = start, progress
            self.discarded_tokens += length * TOKENS
            fields = {"discarded_steps": length, "snapshot_seconds": 0.02, "restore": "trial"} | fields
        self.decide(verdict, scale_after, **fields)

    def window(self, length: int, velocity: float) -> dict[str, float]:
        self.train(length)
        measured = {"velocity": velocity, "error": 4e-4}
        self.decide("window", **measured, reason="watching")
        return {"reference_velocity": velocity, "reference_error": 4e-4, "threshold": 8e-4}

    def write(self, config: dict[str, Any] | None = None) -> Path:
        config = {"lr": BASE_RATE, "train_iters": self.steps} if config is None else config
        (self.path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        self._write_lines("metrics.jsonl", self.metrics)
        if self.decisions:
            self._write_lines("decisions.jsonl", self.decisions)
        return self.path

    def _write_lines(self, name: str, records: list[dict[str, Any]]) -> None:
        (self.path / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def _metric(self, **fields: Any) -> None:
        self.metrics.append({"step": self.step, "total_steps": self.total_steps, "time": self.time} | fields)


def write_run(
    path: Path,
    steps: int = 400,
    seed: int = 0,
    adalrs: bool = True,
    reason: str = "velocity above the reference by more than twice the error",
    bad_losses: dict[int, float] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """A finished run: with AdaLRS two trials are accepted (x9), one fails, one is neutral, one is aborted."""
    run = SyntheticRun(path, steps, seed)
    run.bad_losses = bad_losses or {}
    k = steps // 40
    run.event("start", parameters=1_234_567, world_size=2, data_order="0f3a", snapshot_bytes=14_814_804)
    if adalrs:
        run.train(steps // 10 - 2 * k, "before")
        velocity = 0.02
        for factor, verdict, scale_after in (
            (3.0, "accepted", 3.0),
            (2.97, "accepted", 9.0),
            (2.94, "neutral", 9.0),
            (2.91, "aborted", 9.0),
            (2.88, "failed", 4.55),
        ):
            reference = run.window(k, velocity)
            reference = run.window(k, velocity * 0.8)
            measured = {} if verdict == "aborted" else {"velocity": velocity * 1.5, "error": 5e-4} | reference
            run.trial(
                k // 2 if verdict == "aborted" else k, factor, verdict, scale_after, reason=reason, **measured
            )
            velocity *= 0.7
            run.evaluate()
        run.decide("search_ended", reason="the search window is over")
    while run.step < steps:
        run.train(min(steps // 8, steps - run.step), "done" if adalrs else "fixed")
        run.evaluate()
    run.evaluate("test")
    run.event("end")
    return run.write(config)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run directory of the given name under the test's folder; see write_run."""
    return lambda name, **options: write_run(tmp_path / name, **options)
