from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from megatron_adalrs.metrics.run_log import read_run
from megatron_adalrs.report.drawing import Run
from megatron_adalrs.report.executed_plots import equal_compute_plot, search_plot
from megatron_adalrs.report.loss_plot import loss_plot
from tests.report.conftest import TOKENS, SyntheticRun

MakeRun = Callable[..., Path]


def runs_of(*paths: Path) -> list[Run]:
    return [Run(path.name, "#000000", read_run(path)) for path in paths]


def drawn(figure: go.Figure | None) -> go.Figure:
    assert figure is not None
    return figure


def shaded(figure: go.Figure) -> list[tuple[float, float]]:
    return [(shape.x0, shape.x1) for shape in figure.layout.shapes]


@pytest.fixture
def restarted(tmp_path: Path) -> Path:
    """Run with three trials from the same step, of which the last is still running."""
    run = SyntheticRun(tmp_path / "restarted", 400, 0)
    run.event("start")
    run.train(20)
    for _ in range(2):
        run.trial(10, 3.0, "failed", 1.0)
    run.decide("trial_started", 3.0, capture="trial")
    run.train(10, "trial")
    return run.write()


def test_search_is_zoomed_in_on_executed_steps(make_run: MakeRun) -> None:
    figure = drawn(search_plot(runs_of(make_run("run"))).figure)

    low, high = figure.layout.xaxis.range
    assert 0 < low < 30 and 165 < high < 190
    steps = np.concatenate([np.asarray(t.x) for t in figure.data if t.mode == "lines"])
    assert np.nanmin(steps) >= low and np.nanmax(steps) <= high
    assert len(shaded(figure)) == 5


def test_trials_from_one_step_do_not_cover_each_other(restarted: Path) -> None:
    runs = runs_of(restarted)

    assert shaded(drawn(search_plot(runs).figure)) == [(20.5, 30.5), (30.5, 40.5), (40.5, 50.5)]
    assert shaded(drawn(loss_plot(runs).figure)) == [(20, 30)]


def test_each_search_has_its_own_row(make_run: MakeRun) -> None:
    runs = runs_of(make_run("a"), make_run("fixed", adalrs=False), make_run("b"))
    figure = drawn(search_plot(runs).figure)

    assert [title.text for title in figure.layout.annotations] == ["a", "b"]
    assert search_plot(runs[1:2]).figure is None


def line_x(figure: go.Figure, name: str) -> Any:
    return next(np.asarray(t.x) for t in figure.data if t.name == name and t.mode == "lines")


def test_equal_compute_counts_discarded_work(make_run: MakeRun) -> None:
    runs = runs_of(make_run("search"), make_run("fixed", adalrs=False))
    figure = drawn(equal_compute_plot(runs).figure)

    assert "executed tokens" in figure.layout.xaxis.title.text
    assert line_x(figure, "search")[-1] == 425 * TOKENS
    assert line_x(figure, "fixed")[-1] == 400 * TOKENS
    circles = next(t for t in figure.data if t.mode == "markers" and t.legendgroup == "search")
    assert circles.x[-1] == 425 * TOKENS
    assert equal_compute_plot(runs[1:]).figure is None


def test_equal_compute_without_tokens_counts_steps(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "run", 60, 0)
    run.train(20)
    run.trial(10, 3.0, "failed", 1.0)
    run.train(10)
    for record in run.metrics:
        record.update(consumed_tokens=0, discarded_tokens=0)
    figure = drawn(equal_compute_plot(runs_of(run.write())).figure)

    assert "executed steps" in figure.layout.xaxis.title.text
    assert line_x(figure, "training")[-1] == 40
