"""Mutated records of a run: read, or refused by one sentence that names the file; never another exception."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_adalrs.metrics.run_log import read_run
from tests.helpers.mutations import mutated
from tests.metrics.test_run_log import decision, evaluation, run_event, steps, train, write

FILES = ("metrics.jsonl", "decisions.jsonl", "config.yaml")


def small_run(path: Path) -> Path:
    metrics = [run_event("start", 0, 0, 100.0), *steps(1, 3), evaluation(3, 3), *steps(3, 4, undone=1)]
    decisions = [
        decision("trial_started", 2, 2, 1.0, 3.0),
        decision("failed", 2, 3, 3.0, 0.5, discarded_steps=1),
    ]
    return write(path, metrics, decisions, "lr: 1.0e-4\nadalrs:\n  mode: paper\n")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_records_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    small_run(tmp_path)
    file = tmp_path / data.draw(st.sampled_from(FILES))
    file.write_bytes(data.draw(mutated(file.read_bytes())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            run = read_run(tmp_path)
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path}/") and "\n" not in str(error)
            return
    assert run.train.step.shape == run.train.kept.shape
    assert run.totals.useful_tokens >= 0 and not math.isnan(run.totals.wall_seconds)


@pytest.mark.parametrize("step", [-1, 10**30, 2**63])
def test_a_count_that_no_run_reaches_is_refused(tmp_path: Path, step: int) -> None:
    write(tmp_path, [train(1, 1), train(step, 2), train(3, 3)])
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: step: "):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "config", ["[" * 100_000, "lr: 2024-99-99", "x: 1:99999999999999999999:1\ny: [", "a: !!int x"]
)
def test_an_unreadable_configuration_is_refused(tmp_path: Path, config: str) -> None:
    write(tmp_path, [train(1, 1)], config=config)
    with pytest.raises(ValueError, match=r"config.yaml: not valid YAML: "):
        read_run(tmp_path)
