"""Self-contained HTML pages: the document around a body, with the style sheet, the script and plotly."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
import plotly.graph_objects as go
import plotly.offline
from markupsafe import Markup

from megatron_adalrs import __version__


def html_page(title: str, body: Markup, figures: Mapping[str, go.Figure], footer: str = "") -> str:
    """Return an HTML document that needs no other file and sends no request.

    Args:
        title: Title of the document; it is escaped.
        body: HTML of the page, such as :func:`render_body` returns.
        figures: Plots by key. Each is drawn into the element of the body whose id is ``plot-<key>``.
        footer: Text after the date and the version at the end of the page.
    """
    return render_body(
        _read_asset("base.html"),
        title=title,
        body=body,
        figures=_script_json(figures),
        footer=footer,
        written=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=__version__,
        style=Markup(_read_asset("style.css")),
        script=Markup(_read_asset("page.js")),
        plotly=Markup(plotly.offline.get_plotlyjs()),
    )


def render_body(template: str, **context: Any) -> Markup:
    """Fill a Jinja template and return HTML. Values are escaped; a name that is not given is an error."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return Markup(environment.from_string(template).render(**context))


def _script_json(figures: Mapping[str, go.Figure]) -> Markup:
    """Return the figures as JSON in which no text can close the surrounding script element."""
    pairs = [f"{json.dumps(key)}:{figure.to_json()}" for key, figure in figures.items()]
    return Markup("{" + ",".join(pairs).replace("<", "\\u003c") + "}")


def _read_asset(name: str) -> str:
    return resources.files("megatron_adalrs.report").joinpath(name).read_text(encoding="utf-8")
