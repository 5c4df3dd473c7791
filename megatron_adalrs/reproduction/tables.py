"""Tables of results: mean and worst over seeds, compared with runs of the same seed.

The table of searches is in search_table.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_adalrs.reproduction.plan import PEERS, Settings, Study, scaled
from megatron_adalrs.reproduction.results import Result, Results, differences, steps_to_reach

NOTHING = "–"
"""Text of a cell without runs."""
STEPS_TO_REACH = "steps to the fixed rate's loss"


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def markdown(self) -> str:
        """Return the table with its title and caption as Markdown."""
        lines = [f"### {self.title}", "", _line(self.head), _line(["---"] * len(self.head))]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, "", self.caption] if self.caption else lines)


def grid_table(results: Results, study: Study, schedule: str, best: float) -> Table:
    """Return the table of the fixed rates."""
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
        "of the run, in nats per 1000 steps; beside it the mean training loss over the same steps."
        + _edge_warning(rates, best),
    )


def _edge_warning(rates: Sequence[float], best: float) -> str:
    """Return a warning if the best rate is the lowest or highest of the grid."""
    if len(rates) == 1 or rates[0] < best < rates[-1]:
        return ""
    return f" The best rate, {best:g}, is at an end of the grid: there may be a better one beyond."


def variants_table(
    results: Results,
    study: Study,
    schedule: str,
    best: float,
    title: str,
    rates: Sequence[float],
    variants: Sequence[Settings],
) -> Table:
    """Return the table of paper mode with other settings: loss above the best fixed rate's, and discards."""
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
        "share of train_iters.",
    )


def cost_table(results: Results, study: Study, schedule: str, ratios: Sequence[float], best: float) -> Table:
    """Return the table of the discarded steps, the snapshots and the time of a step."""
    rows = []
    for ratio in ratios:
        lr = scaled(best, ratio)
        fixed = results.of(study.name, schedule, "fixed", lr)
        for method in ("paper", "robust"):
            runs = results.of(study.name, schedule, method, lr)
            if runs:
                rows.append((method, ratio_name(ratio), *_cost_cells(runs, fixed)))
    return Table(
        f"What a search costs: {study.name}, {schedule}",
        ("mode", "from", "discarded steps", "snapshots", "time of a step", STEPS_TO_REACH),
        tuple(rows),
        "Snapshots: all captures and restores, and as a share of the run's time. Time of a step: median, "
        "divided by the fixed run's. It is noisy, because runs share the cores of the machine; "
        "`megatron-adalrs benchmark` measures it in pairs.",
    )


def _cost_cells(runs: dict[int, Result], fixed: dict[int, Result]) -> tuple[str, str, str, str]:
    snapshots = fmean(result.snapshot_seconds / result.wall_seconds for result in runs.values())
    pairs = [result.step_seconds / fixed[seed].step_seconds for seed, result in runs.items() if seed in fixed]
    reached = share_of_steps(runs, fixed)
    return (
        f"{fmean(result.discarded_steps for result in runs.values()):.0f}",
        f"{1e3 * fmean(result.snapshot_seconds for result in runs.values()):.0f} ms ({snapshots:.2%})",
        f"{fmean(pairs):.2f}" if pairs else NOTHING,
        reached[1] if reached else NOTHING,
    )


def peers_table(results: Results, study: Study, schedule: str, best: float) -> Table:
    """Return the table of other optimizers and learning-rate finders."""
    at_best = results.of(study.name, schedule, "fixed", best)
    rows = []
    for method in PEERS:
        for kind in (schedule, "constant"):
            for lr in results.rates(study.name, kind, method):
                runs = results.of(study.name, kind, method, lr)
                found = geometric_mean([result.scale for result in runs.values()])
                rate = f"{lr:g}" if found == 1 else f"found: {lr * found:.2g}"
                discarded = fmean(result.discarded for result in runs.values())
                rows.append((method, kind, rate, _mean_worst(differences(runs, at_best)), f"{discarded:.1%}"))
    return Table(
        f"Peers: {study.name}",
        ("peer", "schedule", "rate", "above the best fixed rate", "discarded"),
        tuple(rows),
        "The same model, data, initial weights and order of batches in a plain PyTorch loop: final "
        f"validation loss above that of AdamW at the best fixed rate ({best:g}, {schedule}), mean [worst "
        "seed]. lr-range-test: AdamW at a rate found by DeepSpeed's LRRangeTest, whose steps are discarded: "
        "the rate at which the loss falls most steeply, or a tenth of the rate at which it is lowest.",
    )


def share_of_steps(runs: dict[int, Result], fixed: dict[int, Result]) -> tuple[float, str] | None:
    """Return the steps until runs reach the loss of the fixed run with the same seed.

    Returns:
        The mean share of the fixed run's steps over the seeds that reach its loss, and its text; None
        without pairs.
    """
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


def geometric_mean(values: list[float]) -> float:
    """Return the geometric mean."""
    return math.exp(fmean(math.log(value) for value in values))


def ratio_name(ratio: float) -> str:
    """Return a ratio as text, such as 1/30, 1 or 10."""
    return f"{ratio:.3g}" if ratio >= 0.995 else f"1/{1 / ratio:.3g}"


def _settings_name(settings: Settings) -> str:
    texts = [
        f"{name} {('off', 'on')[value] if isinstance(value, bool) else f'{value:g}'}"
        for name, value in settings
    ]
    return ", ".join(texts) or "its defaults"


def _mean_worst(values: list[float], discarded: Sequence[float] = ()) -> str:
    if not values:
        return NOTHING
    share = f", {fmean(discarded):.1%}" if discarded else ""
    return f"{fmean(values):+.3f} [{max(values):+.3f}]{share}"


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "diverged"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
