"""The report page: read the runs, fill the template, and write one self-contained file."""

from __future__ import annotations

import datetime
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_adalrs.metrics.records import DecisionRecord
from megatron_adalrs.metrics.run_log import RunLog, read_run
from megatron_adalrs.report.drawing import RUN_COLORS, Plot, Run, event_color, event_name
from megatron_adalrs.report.html import html_page, render_body
from megatron_adalrs.report.outcome import outcome
from megatron_adalrs.report.plots import all_plots
from megatron_adalrs.report.summary import headline
from megatron_adalrs.utils import format as fmt
from megatron_adalrs.utils.atomic_files import atomic_write


def write_report(
    run_dirs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    title: str | None = None,
) -> Path:
    """Write the report of one run, or of several in comparison, as one HTML file and return its path.

    Args:
        run_dirs: Run directories. The other runs are compared with the first.
        output: File to write atomically. Default: report.html in the first directory.
        title: Title of the page. Default: the names of the runs.

    Raises:
        OSError: If a run directory or its metrics.jsonl does not exist, or the output cannot be written.
        ValueError: If a record or configuration is malformed, a run recorded nothing, or no run or the same
            run twice is given.
    """
    if not run_dirs:
        raise ValueError("run_dirs: at least one run directory is required")
    paths = [Path(run_dir) for run_dir in run_dirs]
    for index, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:index]]:
            raise ValueError(f"run_dirs: {path} is given twice")
    logs = [read_run(path) for path in paths]
    names = _names(paths)
    runs = [
        Run(name, RUN_COLORS[i % len(RUN_COLORS)], log)
        for i, (name, log) in enumerate(zip(names, logs, strict=True))
    ]
    output = paths[0] / "report.html" if output is None else Path(output)
    page = _render(runs, title or " · ".join(names), output)
    _write(output, page)
    return output


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest endings of the paths that are all different."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _write(output: Path, page: str) -> None:
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output}: the folder {output.parent} does not exist")
    if output.is_dir():
        raise IsADirectoryError(f"{output}: required a file, but this is a folder")
    with atomic_write(output) as stream:
        stream.write(page.encode())


def _render(runs: Sequence[Run], title: str, output: Path) -> str:
    plots = all_plots(runs)
    body = render_body(
        Path(__file__).with_name("page.html").read_text(encoding="utf-8"),
        title=title,
        runs=[_run_context(run, runs) for run in runs],
        headline=headline([run.log for run in runs]),
        plots=[_plot_context(plot) for plot in plots],
        settings=_settings([run.log.config for run in runs]),
        commands=_commands(runs, output),
    )
    return html_page(title, body, {plot.key: plot.figure for plot in plots if plot.figure is not None})


def _plot_context(plot: Plot) -> dict[str, Any]:
    height = None if plot.figure is None else plot.figure.layout.height
    return {
        "key": plot.key,
        "title": plot.title,
        "caption": plot.caption,
        "note": plot.note,
        "height": height,
    }


def _run_context(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
    rows = [(decision.event == "window", _decision_context(decision)) for decision in run.log.decisions]
    return {
        "name": run.name,
        "color": run.color,
        "about": _about(run.log),
        "outcome": outcome(run, runs),
        "decisions": [row for is_window, row in rows if not is_window],
        "windows": [row for is_window, row in rows if is_window],
    }


def _about(log: RunLog) -> str:
    """Return state, time and size of a run in one line."""
    if not log.events:
        return ""
    first, last = log.events[0], log.events[-1]
    state = {"end": "finished", "interrupted": "interrupted"}.get(last.event, "not finished:")
    parts = [f"{state} at step {fmt.count(log.totals.useful_steps)}"]
    parts.append(f"started {datetime.datetime.fromtimestamp(first.time).astimezone():%Y-%m-%d %H:%M}")
    if first.parameters:
        parts.append(f"{fmt.quantity(first.parameters)} parameters")
    if first.world_size:
        parts.append(f"{first.world_size} rank{'s' if first.world_size > 1 else ''}")
    return ", ".join(parts)


def _decision_context(decision: DecisionRecord) -> dict[str, str]:
    scale = f"{decision.scale_before:.4g}"
    if decision.scale_after != decision.scale_before:
        scale += f" → {decision.scale_after:.4g}"
    return {
        "step": fmt.count(decision.step),
        "total_steps": fmt.count(decision.total_steps),
        "event": event_name(decision.event),
        "color": event_color(decision.event),
        "scale": scale,
        "measured": fmt.velocity(decision.velocity, decision.error)
        if decision.gain is None
        else f"gain {fmt.gain(decision.gain, decision.gain_error)}",
        "reference": fmt.velocity(decision.reference_velocity, decision.reference_error),
        "threshold": _threshold(decision),
        "discarded": fmt.count(decision.discarded_steps) if decision.discarded_steps else "",
        "snapshot": fmt.duration(seconds) if (seconds := decision.snapshot_seconds or 0) > 1e-3 else "",
        "reason": decision.reason,
    }


def _threshold(decision: DecisionRecord) -> str:
    """Return the threshold of a decision, which its event defines: a gain, a velocity, a margin or a loss."""
    if decision.threshold is None:
        return fmt.NOTHING
    if decision.gain is not None:
        return f"gain {decision.threshold:+.4g}"
    if decision.event == "aborted":
        return f"loss {decision.threshold:.4g}"
    sign = "± " if decision.event in ("accepted", "failed", "neutral") else ""
    return sign + fmt.velocity(decision.threshold, None)


@dataclass(frozen=True)
class Setting:
    """A setting with its value in each run."""

    name: str
    values: tuple[str, ...]
    differs: bool


def _settings(configs: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """Return all settings of all runs, those that differ first."""
    flat = [dict(_flatten(config)) for config in configs]
    settings = []
    for name in dict.fromkeys(name for config in flat for name in config):
        values = tuple(config.get(name, fmt.NOTHING) for config in flat)
        settings.append(Setting(name, values, differs=len(set(values)) > 1))
    return sorted(settings, key=lambda setting: not setting.differs)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", "" if value is None else str(value)))
    return pairs


def _commands(runs: Sequence[Run], output: Path) -> list[dict[str, str]]:
    paths = [str(run.log.path) for run in runs]
    commands = [("This page:", ["megatron-adalrs", "report", *paths, "--output", str(output)])]
    first = runs[0].log
    if len(runs) == 1 and first.decisions:
        baseline = f"{first.path}-fixed"
        ranks = next((event.world_size for event in first.events if event.world_size), 1)
        train = ["deepspeed", "--num_accelerators", str(ranks), "pretrain_gpt.py"]
        train += ["--config", str(first.path / "config.yaml"), "--adalrs.mode", "off"]
        # config.yaml names the folders of its own run, which the other must not write to.
        train += ["--run-dir", baseline, "--save", f"{baseline}/checkpoints"]
        train += ["--tensorboard-dir", f"{baseline}/tensorboard"]
        train += ["--load", "None"] if first.config.get("load") else []
        compare = ["megatron-adalrs", "report", baseline, *paths, "--output", "comparison.html"]
        commands += [("The same run without AdaLRS:", train), ("Both in one page:", compare)]
    return [{"purpose": purpose, "line": shlex.join(words)} for purpose, words in commands]
