"""From results to tables: mean and worst over seeds, always against another run of the same seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_adalrs.reproduction.comparison import Results, differences, ratio_name, steps_to_reach
from megatron_adalrs.reproduction.goals import STEPS_TO_REACH, findings, goal_text
from megatron_adalrs.reproduction.plan import EQUAL_COMPUTE, PEERS, Settings, Study, scaled
from megatron_adalrs.reproduction.results import Result

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", _line(self.head), _line(["---"] * len(self.head))]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, "", self.caption] if self.caption else lines)


def grid_table(results: Results, study: Study, schedule: str, best: float) -> Table:
    rows, rates = [], results.rates(study.name, schedule)
    for lr in rates:
        runs = results.of(study.name, schedule, "fixed", lr)
        losses = [result.valid for result in runs.values()]
        velocities = [1e3 * result.velocity for result in runs.values()]
        rows.append(
            (
                f"{lr:g}" + (" (best)" if lr == best else ""),
                _loss(fmean(losses)),
                _loss(max(losses)),
                f"{fmean(velocities):.3g}",
                _loss(fmean(result.window_loss for result in runs.values())),
                str(len(losses)),
            )
        )
    return Table(
        f"Fixed rates: {study.name}, {schedule}",
        ("rate", "final loss", "worst seed", "velocity", "loss in the window", "seeds"),
        tuple(rows),
        "Validation loss in nats per token. Velocity: minus the slope of the training loss from 10 to 40 % "
        "of the run, "
        "in nats per 1000 steps; beside it the mean training loss over the same steps."
        + _at_an_end(rates, best),
    )


def _at_an_end(rates: Sequence[float], best: float) -> str:
    """A warning, where the grid does not show that its best rate is one."""
    is_shown = len(rates) == 1 or rates[0] < best < rates[-1]
    return (
        ""
        if is_shown
        else f" The best rate, {best:g}, is at an end of the grid: there may be a better one beyond."
    )


def search_table(
    results: Results, study: Study, schedule: str, ratios: Sequence[float], best: float
) -> Table:
    """Issue 4's table: losses above the best fixed rate's, against the goals."""
    at_best = results.of(study.name, schedule, "fixed", best)

    def runs(method: str, ratio: float, settings: Settings = ()) -> dict[int, Result]:
        return results.of(study.name, schedule, method, scaled(best, ratio), settings)

    def row(label: str, cell: Callable[[float], tuple[float, str] | None]) -> tuple[str, ...]:
        cells = []
        for ratio in ratios:
            made = cell(ratio)
            cells.append(NOTHING if made is None else made[1] + goal_text(study, label, ratio, made[0]))
        return (label, *cells)

    def above(method: str, of: Callable[[list[float]], float]) -> Callable[[float], tuple[float, str] | None]:
        return lambda ratio: _number(differences(runs(method, ratio), at_best), of, "+.3f")

    def discarded(method: str) -> Callable[[float], tuple[float, str] | None]:
        return lambda ratio: _number([r.discarded for r in runs(method, ratio).values()], fmean, ".1%")

    def found(method: str) -> Callable[[float], tuple[float, str] | None]:
        return lambda ratio: _number(
            [r.run.lr * r.scale / best for r in runs(method, ratio).values()], _geometric, ".2f"
        )

    def equal_compute(ratio: float) -> tuple[float, str] | None:
        return _number(differences(runs("robust", ratio, EQUAL_COMPUTE), at_best), fmean, "+.3f")

    def improvement(ratio: float) -> tuple[float, str] | None:
        return _number(differences(runs("fixed", ratio), runs("paper", ratio)), fmean, "+.3f")

    def reach(method: str) -> Callable[[float], tuple[float, str] | None]:
        return lambda ratio: _reached(runs(method, ratio), runs("fixed", ratio))

    rows = [row("fixed, mean", above("fixed", fmean)), row("fixed, worst", above("fixed", max))]
    for method in ("paper", "robust"):
        rows += [row(f"{method}, mean", above(method, fmean)), row(f"{method}, worst", above(method, max))]
        rows += [row(f"{method}, discarded", discarded(method)), row(f"{method}, rate found", found(method))]
        rows += [row(f"{method}, {STEPS_TO_REACH}", reach(method))]
    if any(runs("robust", ratio, EQUAL_COMPUTE) for ratio in ratios):
        rows.append(row("robust, equal compute", equal_compute))
    rows.append(row("paper, improvement", improvement))
    return Table(
        f"Searches: {study.name}, {schedule}, {len(at_best)} seed{'s' if len(at_best) != 1 else ''}",
        ("initial rate / best fixed", *(ratio_name(ratio) for ratio in ratios)),
        tuple(rows),
        f"Final validation loss minus that of the best fixed rate ({best:g}) with the same seed. Discarded: "
        f"share of "
        "train_iters. Rate found: over the best fixed one, geometric mean. Steps to the fixed rate's loss: "
        "executed "
        "steps, discarded ones included, until the validation loss is the final one of the same initial rate "
        "held "
        "fixed, as a share of that run's; in parentheses how many seeds got there, where not all did. Equal "
        "compute: "
        "discarded steps count (budget total). In brackets the goal, * where it is missed. "
        + findings(results, study, schedule, ratios, best),
    )


def variants_table(
    results: Results,
    study: Study,
    schedule: str,
    best: float,
    title: str,
    rates: Sequence[float],
    variants: Sequence[Settings],
) -> Table:
    """Paper mode under other settings: loss above the best fixed rate's, mean and worst, and what was
    discarded."""
    at_best = results.of(study.name, schedule, "fixed", best)
    rows = []
    for settings in variants:
        cells = []
        for lr in rates:
            runs = results.of(study.name, schedule, "paper", lr, settings)
            cells.append(
                _mean_worst(differences(runs, at_best), [result.discarded for result in runs.values()])
            )
        rows.append((_settings_name(settings), *cells))
    fixed = [_mean_worst(differences(results.of(study.name, schedule, "fixed", lr), at_best)) for lr in rates]
    rows.append(("fixed rate", *fixed))
    return Table(
        title,
        ("paper mode with", *(f"from {ratio_name(lr / best)}" for lr in rates)),
        tuple(rows),
        "Final validation loss above the best fixed rate's with the same seed: mean [worst seed], discarded "
        "share of "
        "train_iters.",
    )


def cost_table(results: Results, study: Study, schedule: str, ratios: Sequence[float], best: float) -> Table:
    rows = []
    for ratio in ratios:
        lr = scaled(best, ratio)
        fixed = results.of(study.name, schedule, "fixed", lr)
        for method in ("paper", "robust"):
            runs = results.of(study.name, schedule, method, lr)
            if not runs:
                continue
            snapshots = fmean(result.snapshot_seconds / result.wall_seconds for result in runs.values())
            pairs = [
                result.step_seconds / fixed[seed].step_seconds
                for seed, result in runs.items()
                if seed in fixed
            ]
            reached = _reached(runs, fixed)
            rows.append(
                (
                    method,
                    ratio_name(ratio),
                    f"{fmean(result.discarded_steps for result in runs.values()):.0f}",
                    f"{1e3 * fmean(result.snapshot_seconds for result in runs.values()):.0f} ms "
                    f"({snapshots:.2%})",
                    f"{fmean(pairs):.2f}" if pairs else NOTHING,
                    reached[1] if reached else NOTHING,
                )
            )
    return Table(
        f"What a search costs: {study.name}, {schedule}",
        ("mode", "from", "discarded steps", "snapshots", "time of a step", STEPS_TO_REACH),
        tuple(rows),
        "Snapshots: capture and restore in all, and as a share of the run's time. Time of a step: median, "
        "over the "
        "fixed run's; runs share the machine's cores, so that it is noisy: `megatron-adalrs benchmark` "
        "measures it paired.",
    )


def peers_table(results: Results, study: Study, schedule: str, best: float) -> Table:
    at_best = results.of(study.name, schedule, "fixed", best)
    rows = []
    for method in PEERS:
        for kind in (schedule, "constant"):
            for lr in results.rates(study.name, kind, method):
                runs = results.of(study.name, kind, method, lr)
                found = _geometric([result.scale for result in runs.values()])
                rate = f"{lr:g}" if found == 1 else f"found: {lr * found:.2g}"
                discarded = fmean(result.discarded for result in runs.values())
                rows.append((method, kind, rate, _mean_worst(differences(runs, at_best)), f"{discarded:.1%}"))
    return Table(
        f"Peers: {study.name}",
        ("peer", "schedule", "rate", "above the best fixed rate", "discarded"),
        tuple(rows),
        "The same model, data, initial weights and order of batches in a plain PyTorch loop: final "
        "validation loss "
        f"above that of AdamW at the best fixed rate ({best:g}, {schedule}), mean [worst seed]. "
        f"lr-range-test: AdamW "
        "at a rate read off DeepSpeed's LRRangeTest, whose steps are discarded: where the loss falls most "
        "steeply, or "
        "a tenth of where it is lowest.",
    )


def _settings_name(settings: Settings) -> str:
    words = [
        f"{name} {('off', 'on')[value] if isinstance(value, bool) else f'{value:g}'}"
        for name, value in settings
    ]
    return ", ".join(words) or "its defaults"


def _mean_worst(values: list[float], discarded: Sequence[float] = ()) -> str:
    if not values:
        return NOTHING
    share = f", {fmean(discarded):.1%}" if discarded else ""
    return f"{fmean(values):+.3f} [{max(values):+.3f}]{share}"


def _number(values: list[float], of: Callable[[list[float]], float], shape: str) -> tuple[float, str] | None:
    if not values:
        return None
    value = of(values)
    return value, format(value, shape)


def _geometric(values: list[float]) -> float:
    return math.exp(fmean(math.log(value) for value in values))


def _reached(runs: dict[int, Result], fixed: dict[int, Result]) -> tuple[float, str] | None:
    """Mean share of the fixed run's steps, over the seeds that reached its loss."""
    pairs = [
        (steps_to_reach(result, fixed[seed].valid), fixed[seed])
        for seed, result in runs.items()
        if seed in fixed
    ]
    shares = [steps / reference.train_iters for steps, reference in pairs if steps is not None]
    if not pairs:
        return None
    if not shares:
        return math.inf, f"never (0 of {len(pairs)})"
    some = "" if len(shares) == len(pairs) else f" ({len(shares)} of {len(pairs)})"
    return fmean(shares), f"{fmean(shares):.0%}{some}"


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "diverged"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
