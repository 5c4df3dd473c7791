"""The report of a reproduction: report.html, report.md, results.json and results.csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import plotly.graph_objects as go

from megatron_adalrs.report.html import html_page, render_body
from megatron_adalrs.reproduction import plan
from megatron_adalrs.reproduction.figures import grid_figure, search_figure
from megatron_adalrs.reproduction.plan import CONTINUAL, MAIN, Scale, Study, scaled
from megatron_adalrs.reproduction.results import Result, Results
from megatron_adalrs.reproduction.search_table import search_table
from megatron_adalrs.reproduction.tables import Table, cost_table, grid_table, peers_table, variants_table
from megatron_adalrs.utils.atomic_files import atomic_write

LOCAL_LIMITS = (
    "The models, the batches and the runs are small: nothing here confirms or refutes the paper at its "
    "scale, and losses are noisier here than there.",
)
CLUSTER_LIMITS = (
    "Unless --rates gave them, the initial rates are choices of this project; the best fixed rate is the "
    "best of those that were run.",
)
_VARIANT_TITLES = {
    "ablation": "With and without backtracking",
    "factors": "Factors",
    "windows": "Windows and decay of the factors",
}


@dataclass(frozen=True)
class Section:
    """A table and, above it, a plot."""

    table: Table
    figure: go.Figure | None = None
    key: str = ""
    """Identifies the plot in the page."""


@dataclass(frozen=True)
class Report:
    """Contents of a report."""

    title: str
    about: Sequence[str]
    """Lines below the title."""
    sections: Sequence[Section]
    results: Sequence[Result]
    failures: Mapping[str, str]
    """Names of the runs without a result, with the reasons."""
    limits: Sequence[str]
    command: str
    """Command that wrote the report."""

    def write(self, output: Path) -> Path:
        """Write the files of the report into a folder and return the path of the HTML page.

        Raises:
            OSError: A file cannot be written.
        """
        _write(output / "report.html", self._html())
        _write(output / "report.md", self._markdown())
        _write(output / "results.json", json.dumps([asdict(result) for result in self.results], indent=1))
        _write(output / "results.csv", _csv(self.results))
        return output / "report.html"

    def _html(self) -> str:
        body = render_body(Path(__file__).with_name("report.html").read_text(encoding="utf-8"), **vars(self))
        figures = {section.key: section.figure for section in self.sections if section.figure is not None}
        return html_page(
            self.title, body, figures, "Raw results: results.csv and results.json beside this page."
        )

    def _markdown(self) -> str:
        tables = [section.table.markdown() for section in self.sections]
        parts = [f"# {self.title}", *self.about, *tables, *self.limits, f"`{self.command}`"]
        return "\n\n".join(parts) + "\n"


def local_sections(results: Results, experiments: Sequence[str], scale: Scale) -> list[Section]:
    """Return the sections of the experiments on this machine, without those that have no run."""
    sections = []
    for study, schedules in plan.studies_of(experiments, scale):
        for schedule in schedules:
            best = results.best_rate(study.name, schedule, plan.rates_of(study, scale))
            sections.append(_grid(results, study, schedule, best, f"grid-{study.name}-{schedule}"))
    for study, schedule in plan.searches_of(experiments, scale):
        best = results.best_rate(study.name, schedule, scale.rates)
        sections += _searches(results, study, schedule, scale.ratios, best)
    sections += _variants(results, experiments, scale)
    if "continual" in experiments:
        sections += _continual(results, scale)
    if "peers" in experiments:
        best = results.best_rate(MAIN.name, scale.schedules[0], scale.rates)
        sections.append(Section(peers_table(results, MAIN, scale.schedules[0], best)))
    return [section for section in sections if section.table.rows]


def cluster_sections(results: Results, preset: str) -> list[Section]:
    """Return the sections of the complete runs on a cluster, for schedules with a run at a fixed rate."""
    sections = []
    study = Study(preset, "", 0)
    rates = sorted({result.run.lr for result in results.all})
    for schedule in dict.fromkeys(result.run.schedule for result in results.all):
        if results.rates(preset, schedule):
            best = results.best_rate(preset, schedule)
            sections.append(_grid(results, study, schedule, best, f"grid-{schedule}"))
            sections += _searches(results, study, schedule, [rate / best for rate in rates], best)
    return [section for section in sections if section.table.rows]


def _grid(results: Results, study: Study, schedule: str, best: float, key: str) -> Section:
    return Section(grid_table(results, study, schedule, best), grid_figure(results, study, schedule), key)


def _searches(
    results: Results, study: Study, schedule: str, ratios: Sequence[float], best: float
) -> list[Section]:
    figure = search_figure(results, study, schedule, ratios, best)
    table = search_table(results, study, schedule, ratios, best)
    key = f"search-{study.name}-{schedule}".replace(".", "-")
    return [Section(table, figure, key), Section(cost_table(results, study, schedule, ratios, best))]


def _continual(results: Results, scale: Scale) -> list[Section]:
    schedule = scale.schedules[0]
    source = results.best_rate(MAIN.name, schedule, scale.rates)
    best = results.best_rate(CONTINUAL.name, schedule, scale.continual_rates)
    search, cost = _searches(results, CONTINUAL, schedule, plan.continual_ratios(scale), best)
    about = (
        f"Continual pretraining: {scale.continual_iters} steps on {CONTINUAL.corpus} from the weights that "
        f"{scale.train_iters} steps on {MAIN.corpus} at the best fixed rate ({source:g}, {schedule}, the "
        "same seed) ended with. Optimizer, warm-up, schedule and search start from scratch."
    )
    return [replace(search, table=replace(search.table, caption=f"{about} {search.table.caption}")), cost]


def _variants(results: Results, experiments: Sequence[str], scale: Scale) -> list[Section]:
    sections = []
    schedule = scale.schedules[0]
    for name, (ratios, variants) in plan.variants_of(experiments, scale).items():
        best = results.best_rate(MAIN.name, schedule, scale.rates)
        rates = [scaled(best, ratio) for ratio in ratios]
        table = variants_table(results, MAIN, schedule, best, _VARIANT_TITLES[name], rates, variants)
        sections.append(Section(table))
    return sections


def _csv(results: Sequence[Result]) -> str:
    """Return one line per run, without the curves."""
    rows = []
    for result in results:
        row = asdict(result)
        run = row.pop("run") | {"settings": dict(result.run.settings)}
        del row["curve"]
        rows.append(run | row)
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return stream.getvalue()


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as stream:
        stream.write(text.encode())
