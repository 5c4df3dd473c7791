from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_adalrs.adalrs.paper import Velocity
from megatron_adalrs.report import write_report
from tests.report.conftest import SyntheticRun

MakeRun = Callable[..., Path]
SECTIONS = [
    "outcome",
    "summary",
    "loss",
    "search",
    "compute",
    "lr",
    "velocity",
    "discarded",
    "throughput",
    "decisions",
    "configuration",
    "commands",
]


class Page(HTMLParser):
    """What a parser sees: tags with attributes, text by section, contents of script elements."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self.scripts: list[str] = []
        self.title = self._inside = self._section = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.figures: dict[str, Any] = json.loads(self.scripts[1])

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "section":
            self._section = dict(attributes)["id"] or ""
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside == "title":
            self.title += data
        elif self._section and self._inside != "style":
            text = self.sections.get(self._section, "") + " " + data
            self.sections[self._section] = " ".join(text.split())

    def has(self, tag: str) -> bool:
        return any(name == tag for name, _ in self.tags)


def values(array: Any) -> np.ndarray:
    """The numbers of a plotly attribute, which are a list or base64."""
    if isinstance(array, dict):
        return np.frombuffer(base64.b64decode(array["bdata"]), dtype=array["dtype"])
    return np.array(array, dtype=np.float64)


def trace(figure: Any, name: str) -> Any:
    return next(trace for trace in figure["data"] if trace["name"] == name and trace.get("showlegend"))


def test_sections_in_order_and_headline_figures(make_run: MakeRun) -> None:
    run = make_run("run")
    page = Page(write_report([run]))

    assert list(page.sections) == SECTIONS
    assert page.title == "run"
    summary = page.sections["summary"]
    assert "Learning rate found 4.55e-4 1e-4 given × 4.55" in summary
    assert "AdaLRS trials 5 2 accepted, 1 failed, 1 aborted, 1 neutral" in summary
    assert "Useful steps 400 + 25 discarded (5.9%) = 425 executed" in summary
    assert "Useful tokens 1.64 M + 102 k discarded (5.9%) = 1.74 M executed" in summary
    assert "Time for snapshots 0.26s" in summary
    last = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"valid"' in line
    ][-1]
    assert f"Validation loss {last['loss']:.4f} at step 400" in summary
    assert f"Validation perplexity {last['perplexity']:.2f}" in summary


def test_nothing_is_loaded_from_anywhere(make_run: MakeRun) -> None:
    page = Page(write_report([make_run("a"), make_run("b")]))

    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert not {"src", "href", "srcset", "action"} & attributes.keys(), (tag, attributes)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none';") and "http" not in policy


def test_loss_plot_has_every_curve(make_run: MakeRun) -> None:
    figure = Page(write_report([make_run("run")])).figures["loss"]

    training = trace(figure, "training")
    assert values(training["x"]).tolist() == list(range(1, 401))
    undone = trace(figure, "undone trials")
    assert np.isfinite(values(undone["y"])).sum() == 10 + 5 + 10
    assert len(trace(figure, "validation")["x"]) > 0
    assert [shape["x0"] for shape in figure["layout"]["shapes"]] == [40, 70, 100, 120, 140]
    assert [shape["x1"] for shape in figure["layout"]["shapes"]] == [50, 80, 110, 125, 150]
    for event, steps in (("accepted", [50, 80]), ("neutral", [100]), ("aborted", [120]), ("failed", [140])):
        assert values(trace(figure, event)["x"]).tolist() == steps
    assert "scale 25.92 → 4.55" in trace(figure, "failed")["text"][0]
    assert "velocity above the reference" in trace(figure, "failed")["text"][0]
    assert "nats" in figure["layout"]["yaxis"]["title"]["text"]


def test_velocity_plot_has_standard_errors_and_bounds(make_run: MakeRun) -> None:
    figure = Page(write_report([make_run("run")])).figures["velocity"]

    window = trace(figure, "window")
    assert values(window["y"])[:2] == pytest.approx([0.02, 0.016])
    assert values(window["error_y"]["array"])[:2] == pytest.approx([4e-4, 4e-4])
    marks = trace(figure, "threshold")
    assert values(marks["y"])[:2] == pytest.approx([0.016 - 8e-4, 0.016 + 8e-4])
    assert values(marks["x"])[:2].tolist() == [50, 50]
    assert figure["layout"]["yaxis"]["title"]["text"] == "velocity (nats per step)"
    assert values(trace(figure, "failed")["x"]).tolist() == [150]


def test_gains_have_their_thresholds_and_one_unit(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "run", 60, 0)
    run.train(20)
    reason = "the trial gained 0.05 ± 0.01 in loss, needed 0.02"
    run.decide("accepted", 3.0, gain=0.05, gain_error=0.01, threshold=0.02, reason=reason)
    run.decide("aborted", 3.0, gain=-0.15, gain_error=0.03, threshold=-0.14)
    page = Page(write_report([run.write()]))

    figure = page.figures["velocity"]
    assert values(trace(figure, "accepted")["error_y"]["array"]) == pytest.approx([0.01])
    assert values(trace(figure, "threshold")["y"]) == pytest.approx([0.02, -0.14])
    assert "gain +0.05 ± 0.01" in page.sections["decisions"]
    assert "± standard error" in page.sections["decisions"]
    assert "± standard error" in page.sections["velocity"]


def test_table_and_reason_give_the_same_velocity(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "run", 60, 0)
    run.train(20)
    velocity = Velocity(0.01423, 0.0004)
    run.decide("window", velocity=velocity.value, error=velocity.error, reason=f"velocity {velocity}")
    decisions = Page(write_report([run.write()])).sections["decisions"]

    assert decisions.count("0.01423 ± 0.0004") == 2


def test_cosine_end_does_not_stretch_the_rates(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "run", 60, 0)
    run.train(60)
    for index, record in enumerate(run.metrics):
        record["lr"] = 1e-3 * (1 + math.cos(math.pi * (index + 1) / 60.001)) / 2
        record["scale"] = 1.0 if index < 30 else 3.0
    assert run.metrics[-1]["lr"] < 1e-10
    low, high = Page(write_report([run.write()])).figures["lr"]["layout"]["yaxis"]["range"]

    assert -5 < low < -4 and -3 < high < -2.8


def test_a_failed_kept_trial_is_drawn_at_its_end(tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "run", 60, 0)
    run.event("start", parameters=1, world_size=1, data_order="0f3a", snapshot_bytes=0)
    measured = run.window(20, 0.02)
    run.decide("trial_started", 3.0)
    run.train(10, "trial")
    run.decide("failed", 1.5, velocity=0.01, error=4e-4, **measured)
    figure = Page(write_report([run.write()])).figures["velocity"]
    assert values(trace(figure, "failed")["x"]).tolist() == [30]


def test_decision_table_and_windows(make_run: MakeRun) -> None:
    page = Page(write_report([make_run("run")]))

    decisions, windows = page.sections["decisions"].split("10 watched windows")
    assert decisions.count("trial started") == 5
    assert "failed 25.92 → 4.55" in decisions
    assert "search ended" in decisions
    assert windows.count("watching") == 10
    assert page.has("details")


def test_configuration_is_flat_and_complete(make_run: MakeRun) -> None:
    config = {"lr": 1e-4, "bf16": False, "adalrs": {"mode": "paper", "alpha": 3.0}}
    page = Page(write_report([make_run("run", config=config)]))

    assert "lr 0.0001 bf16 False adalrs.mode paper adalrs.alpha 3.0" in page.sections["configuration"]


def test_commands_to_compare(make_run: MakeRun) -> None:
    run = make_run("my run")
    commands = Page(write_report([run])).sections["commands"]

    assert f"megatron-adalrs report '{run}' --output '{run}/report.html'" in commands
    assert "deepspeed --num_accelerators 2 pretrain_gpt.py" in commands
    assert f"--adalrs.mode off --run-dir '{run}-fixed' --save '{run}-fixed/checkpoints'" in commands


def test_two_runs_are_compared(make_run: MakeRun, tmp_path: Path) -> None:
    fixed = make_run("fixed", adalrs=False, config={"lr": 1e-4, "seed": 1, "adalrs": {"mode": "off"}})
    search = make_run("search", config={"lr": 1e-4, "seed": 1, "adalrs": {"mode": "paper"}})
    page = Page(write_report([fixed, search], tmp_path / "both.html", title="Fixed or found"))

    assert page.title == "Fixed or found"
    assert "Learning rate found 1e-4 as given: no AdaLRS decision 4.55e-4 × 4.55" in page.sections["summary"]
    assert "Useful steps 400 none discarded 400 same" in page.sections["summary"]
    assert "better" in [
        attributes.get("class", "").split()[-1] for _, attributes in page.tags if attributes.get("class")
    ]
    for key in ("loss", "lr", "throughput"):
        colors = [trace(page.figures[key], name)["line"]["color"] for name in ("fixed", "search")]
        assert len(set(colors)) == 2
    assert "1 of 3 settings differ" in page.sections["configuration"]
    assert page.sections["configuration"].index("adalrs.mode") < page.sections["configuration"].index("seed")
    assert "fixed No decision was recorded" in page.sections["decisions"]


def test_runs_of_one_name_are_named_with_their_folder(make_run: MakeRun, tmp_path: Path) -> None:
    page = Page(write_report([make_run("a/run"), make_run("b/run")], tmp_path / "page.html"))

    assert page.title == "a/run · b/run"


def test_a_run_without_adalrs_says_what_is_missing(make_run: MakeRun) -> None:
    page = Page(write_report([make_run("run", adalrs=False)]))

    assert list(page.figures) == ["loss", "lr", "throughput"]
    assert "AdaLRS was off" in page.sections["velocity"]
    assert "No step was discarded" in page.sections["discarded"]
    assert "No decision was recorded: AdaLRS was off" in page.sections["decisions"]
    assert "pretrain_gpt.py" not in page.sections["commands"]


def test_non_finite_losses_are_gaps_and_counted(make_run: MakeRun) -> None:
    page = Page(write_report([make_run("run", bad_losses={200: math.nan, 201: math.inf, 202: -math.inf})]))

    assert "3 of 425 losses were not finite" in page.sections["loss"]
    loss = values(trace(page.figures["loss"], "training")["y"])
    assert (np.flatnonzero(~np.isfinite(loss)) == [199, 200, 201]).all()
    assert not np.isinf(loss).any()
    assert all(math.isfinite(bound) for bound in page.figures["loss"]["layout"]["yaxis"]["range"])


def test_a_run_with_no_finite_loss_still_gets_a_page(make_run: MakeRun) -> None:
    run = make_run("run", adalrs=False, bad_losses=dict.fromkeys(range(1, 401), math.nan))
    (run / "metrics.jsonl").write_text(
        "".join(line for line in (run / "metrics.jsonl").open() if '"kind": "eval"' not in line)
    )
    page = Page(write_report([run]))

    assert "400 of 400 losses were not finite" in page.sections["loss"]
    assert "loss" not in page.figures


def test_a_diverged_trial_does_not_flatten_the_axis(make_run: MakeRun) -> None:
    low, high = Page(write_report([make_run("run", bad_losses={300: 1e30})])).figures["loss"]["layout"][
        "yaxis"
    ]["range"]

    assert 0 < low < high < 20


def test_what_users_wrote_is_escaped(make_run: MakeRun) -> None:
    evil = "</script><img src=x onerror=alert(1)>&amp;"
    run = make_run("<b>run<b>", reason=evil, config={"lr": 1e-4, evil: evil})
    page = Page(write_report([run, make_run("other")], run / "page.html", title=f"t {evil}"))

    assert page.title == f"t {evil}"
    assert not page.has("img") and not page.has("b")
    assert len(page.scripts) == 3
    assert evil in page.sections["decisions"] and evil in page.sections["configuration"]
    assert "<" not in page.scripts[1]
    assert trace(page.figures["lr"], "&lt;b&gt;run&lt;b&gt;")
    assert "&lt;/script&gt;" in trace(page.figures["loss"], "failed")["text"][0]


def test_long_runs_are_thinned(make_run: MakeRun, tmp_path: Path) -> None:
    path = write_report([make_run("a", steps=12_000), make_run("b", steps=12_000)], tmp_path / "page.html")
    page = Page(path)

    for figure in page.figures.values():
        assert all(len(values(trace["x"])) <= 2000 for trace in figure["data"])
    assert sum(len(script) for script in page.scripts[1:]) < 500_000


def test_the_page_replaces_an_older_one_atomically(make_run: MakeRun) -> None:
    run = make_run("run")
    path = write_report([run])
    before = path.read_text()
    (run / "config.yaml").write_text("[")
    with pytest.raises(ValueError, match=r"config\.yaml"):
        write_report([run])
    assert path.read_text() == before

    (run / "config.yaml").write_text("lr: 0.5\n")
    write_report([run])
    assert path.read_text() != before
    assert sorted(file.name for file in run.iterdir()) == [
        "config.yaml",
        "decisions.jsonl",
        "metrics.jsonl",
        "report.html",
    ]


def test_no_run_and_a_run_twice_are_refused(make_run: MakeRun) -> None:
    with pytest.raises(ValueError, match="at least one"):
        write_report([])
    run = make_run("run")
    with pytest.raises(ValueError, match="given twice"):
        write_report([run, run.parent / "." / "run"])


def test_each_corpus_has_a_curve_and_a_figure(tmp_path: Path) -> None:
    made = SyntheticRun(tmp_path / "run", 40, seed=0)
    for _ in range(2):
        made.train(20)
        for split in ("valid/code", "valid/<b>", "valid", "test"):
            made.evaluate(split)
    page = Page(write_report([made.write()]))
    figure = page.figures["loss"]
    assert trace(figure, "validation code")["mode"] == "lines+markers"
    assert values(trace(figure, "validation code")["x"]).tolist() == [20, 40]
    assert trace(figure, "validation")["mode"] == "markers"
    losses = [record["loss"] for record in made.metrics if record.get("split") == "valid/code"]
    assert f"Validation loss on code {losses[-1]:.4f} at step 40" in page.sections["summary"]
    assert "Validation loss on <b>" in page.sections["summary"]


def test_consumption_of_each_corpus_is_reported(tmp_path: Path) -> None:
    blend, alone = (SyntheticRun(tmp_path / name, 40, seed=0) for name in ("blend", "alone"))
    for made in (blend, alone):
        made.train(40)
    blend.consume(code=1000, prose=500)
    blend.consume(code=30_000, prose=15_000)
    alone.consume(code=45_000)
    alone.write()
    summary = Page(write_report([blend.write()])).sections["summary"]
    assert "Trained on code 30 k tokens, 66.7%; 3 epochs" in summary
    assert "Trained on prose 15 k tokens, 33.3%; 1.5 epochs" in summary
    assert "Trained on" not in Page(write_report([alone.path])).sections["summary"]
    both = Page(write_report([alone.path, blend.path])).sections["summary"]
    assert "Trained on code 45 k tokens, 100.0%; 4.5 epochs 30 k" in both
