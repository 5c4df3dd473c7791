"""Tables of replays for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_adalrs.analysis.loss_log import LossLog
from megatron_adalrs.analysis.replay_report import Lengths, Report, Row, Scenario

_UNREMARKABLE = ("initial_kept", "control_started", "caught_up")
_COLOURS = {"accepted": "green", "failed": "red", "aborted": "red", "scaled_down": "red"}
_SCENARIOS = {
    ("paper", "equal"): "Decisions",
    (
        "robust",
        "equal",
    ): "If no trial is better: races, their errors, and the smallest gain that is accepted",
    ("robust", "worse"): "If trials are far worse: early ends",
}


def print_report(log: LossLog, reports: Sequence[Report], refused: Sequence[str]) -> None:
    """Print the reports of a recorded loss, and the reasons for the modes that were not replayed."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    console.print(
        f"{escape(log.source)}: {len(log.losses)} losses, one every {log.interval} steps, up to step "
        f"{log.steps}"
        if log.interval > 1
        else f"{escape(log.source)}: {len(log.losses)} losses"
    )
    for report in reports:
        _print_mode(console, report)
    for why in refused:
        console.print(f"\n[bold]Not replayed[/]: {escape(why)}")


def _print_mode(console: Console, report: Report) -> None:
    console.print(f"\n[bold]{report.mode}[/] over {report.train_iters} steps {report.plan}")
    noise = (
        f"noise of a single loss during the search: "
        f"{'unknown' if report.noise is None else f'{report.noise:.4g} nats'}"
    )
    if report.mode == "robust":
        noise += (
            f"; the noise of the difference of two arms on the same batches is "
            f"{report.unpaired:.2g} x sqrt(2) x this noise"
        )
    console.print(noise)
    console.print(f"basis: {report.basis}")
    for scenario in report.scenarios:
        _print_scenario(console, report, scenario)
    table = Table(title="Precision with other lengths", title_justify="left")
    names = list(report.lengths[0].steps)
    heads = (
        ("windows", "trials", "velocity / error", "smallest detectable change")
        if report.mode == "paper"
        else ("races", "trials", "smallest gain")
    )
    for head in (*(name.replace("_", " ") for name in names), *heads, "discarded"):
        table.add_column(head, justify="right")
    for row in report.lengths:
        table.add_row(*(str(row.steps[name]) for name in names), *_precision(report.mode, row))
    console.print(table)


def _precision(mode: str, row: Lengths) -> list[str]:
    if row.comparisons is None:
        return ["does not fit"]
    cells = [str(row.comparisons), str(row.trials)]
    if mode == "paper":
        cells += [
            f"{row.signal:.2g}" if row.signal is not None else "-",
            f"{row.least:.0%}" if row.least else "-",
        ]
    else:
        cells += [f"{row.least:.2g}" if row.least is not None else "-"]
    return [*cells, str(row.discarded_steps)]


def _print_scenario(console: Console, report: Report, scenario: Scenario) -> None:
    is_paper = report.mode == "paper"
    if scenario.arms == "better":
        console.print(f"If every trial is better: {_ending(report, scenario)}")
        return
    is_record = all(row.recorded for row in scenario.decisions)
    title = "Decisions" if is_record else _SCENARIOS[report.mode, scenario.arms]
    table = Table(title=title, title_justify="left")
    measures = ("velocity", "before", "margin or trigger") if is_paper else ("noise", "gain", "smallest gain")
    for head in ("executed", "step", "decision", "scale", *measures, "discarded", "basis"):
        table.add_column(head, justify="left" if head in ("decision", "basis") else "right")
    for row in scenario.decisions:
        if row.event in _UNREMARKABLE or (not is_paper and row.event == "trial_started"):
            continue
        colour = _COLOURS.get(row.event, "default")
        table.add_row(
            str(row.executed),
            str(row.step),
            f"[{colour}]{row.event.replace('_', ' ')}[/]",
            _scale(row),
            *(_velocities(row) if is_paper else _gains(row)),
            str(row.discarded_steps or ""),
            "record" if row.recorded else "assumed",
        )
    console.print(table)
    console.print(_ending(report, scenario))


def _ending(report: Report, scenario: Scenario) -> str:
    ended = "" if scenario.finished else "; the record ends before the search"
    share = scenario.discarded_steps / report.train_iters
    return f"scale {scenario.scale:.4g}, {scenario.discarded_steps} steps discarded ({share:.1%}){ended}"


def _scale(row: Row) -> str:
    is_same = row.scale_before == row.scale_after
    return f"{row.scale_after:.3g}" if is_same else f"{row.scale_before:.3g} -> {row.scale_after:.3g}"


def _velocities(row: Row) -> list[str]:
    return [_with_error(row.velocity, row.error), _number(row.reference_velocity), _number(row.threshold)]


def _gains(row: Row) -> list[str]:
    if row.recorded or row.gain is None:
        gain = _with_error(row.gain, row.gain_error)
    else:  # only the error comes from the record
        gain = f"? ± {row.gain_error:.2g}" if row.gain_error else "?"
    return [_number(row.noise), gain, _number(row.threshold)]


def _with_error(value: float | None, error: float | None) -> str:
    return "" if value is None else f"{value:.2g} ± {error:.2g}" if error is not None else f"{value:.2g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
