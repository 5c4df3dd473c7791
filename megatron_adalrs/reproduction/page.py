"""The report: report.html, its tables as report.md, and all results as results.json and results.csv."""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import jinja2
import plotly.graph_objects as go
import plotly.offline
from markupsafe import Markup

from megatron_adalrs import __version__
from megatron_adalrs.reproduction.results import Result
from megatron_adalrs.reproduction.tables import Table
from megatron_adalrs.utils.atomic_files import atomic_write

_LIMITS = {
    "local": (
        "Small models, small batches and short runs: nothing here confirms or refutes the paper at its "
        "scale, and "
        "losses are noisier here than there.",
    ),
    "cluster": (
        "The initial rates are choices of this project unless --rates gave them; the best fixed rate is the "
        "best of "
        "those that were run.",
    ),
}


@dataclass(frozen=True)
class Section:
    """A table and, above it, a plot."""

    table: Table
    figure: go.Figure | None = None
    key: str = ""


def write_report(
    output: Path,
    title: str,
    about: Sequence[str],
    sections: Sequence[Section],
    results: Sequence[Result],
    failures: Mapping[str, str],
    command: str,
    is_cluster: bool = False,
) -> Path:
    """Write report.html, report.md, results.json and results.csv into `output`; the path of the page.

    Raises:
        OSError: they cannot be written.
    """
    limits = _LIMITS["cluster" if is_cluster else "local"]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    figures = {section.key: section.figure for section in sections if section.figure is not None}
    page = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).render(
        title=title,
        about=about,
        sections=sections,
        failures=failures,
        limits=limits,
        command=command,
        results=results,
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=__version__,
        style=_asset("style.css"),
        script=_asset("page.js"),
        plotly=Markup(plotly.offline.get_plotlyjs()),
        figures=_script_json(figures),
    )
    text = "\n\n".join(
        [f"# {title}", *about, *(section.table.markdown() for section in sections), *limits, f"`{command}`"]
    )
    _write(output / "report.html", page)
    _write(output / "report.md", text + "\n")
    _write(output / "results.json", json.dumps([asdict(result) for result in results], indent=1))
    _write(output / "results.csv", _csv(results))
    return output / "report.html"


def _csv(results: Sequence[Result]) -> str:
    """One line a run; the curves are in results.json only."""
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


def _script_json(figures: Mapping[str, go.Figure]) -> Markup:
    """JSON that cannot end the script element it stands in."""
    pairs = [f"{json.dumps(key)}:{figure.to_json()}" for key, figure in figures.items()]
    return Markup("{" + ",".join(pairs).replace("<", "\\u003c") + "}")


def _asset(name: str) -> Markup:
    """A file of the reports on runs, whose looks this page shares."""
    return Markup(resources.files("megatron_adalrs.report").joinpath(name).read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as stream:
        stream.write(text.encode())
