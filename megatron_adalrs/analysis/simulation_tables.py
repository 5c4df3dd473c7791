"""Table and plot of a simulation study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_adalrs.analysis.simulation_study import Cell, Study


def print_study(study: Study, cells: Sequence[Cell], runs: int, seconds: float) -> None:
    """Print one table per mode; `runs` is the number of runs per cell."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    surface = study.surface
    blocks = f" in blocks of {study.block}" if study.block > 1 else ""
    console.print(
        f"{study.train_iters} steps{blocks}, {study.schedule_name}; "
        f"loss {surface.floor:.3g} + {surface.drop:.3g} (1 + u / {surface.pace:.3g})^-{surface.exponent:g} "
        f"+ {surface.heat:.2g} h, noise {surface.noise:.3g} nats"
    )
    initial = list(dict.fromkeys(cell.initial for cell in cells))
    for mode in dict.fromkeys(cell.mode for cell in cells):
        title = (
            f"{mode}: within a factor of 2 of the best rate | excess loss | discarded, by initial / best rate"
        )
        table = Table(title=title, title_justify="left")
        for head in ("noise", "lengths", "steps", *(f"{ratio:.3g}" for ratio in initial)):
            table.add_column(head, justify="right")
        mine = [cell for cell in cells if cell.mode == mode]
        for first in range(0, len(mine), len(initial)):
            row = mine[first : first + len(initial)]
            if row[0].length == mine[0].length and first:
                table.add_section()
            table.add_row(f"{row[0].noise:.3g}", f"x {row[0].length:g}", row[0].steps, *map(_cell, row))
        console.print(table)
    simulated = runs * sum(cell.within_two is not None for cell in cells)
    console.print(
        f"{runs} runs per cell; {simulated} runs in {seconds:.0f} s, "
        f"{60 * simulated / seconds:.0f} per minute"
    )


def _cell(cell: Cell) -> str:
    if cell.within_two is None:
        return "does not fit"
    return f"{cell.within_two:.0%} | {cell.excess:+.3f} | {cell.discarded:.0%}"


def plot(path: Path, cells: Sequence[Cell]) -> None:
    """Write a plot of the probability of ending within a factor of 2 of the best rate over the noise.

    There is one line for each combination of mode, length and initial rate.
    """
    from megatron_adalrs.report.drawing import RUN_COLORS, new_figure

    figure = new_figure(
        "noise of a single loss, nats", "probability of ending within a factor of 2 of the best rate", 480
    )
    kinds = list(dict.fromkeys((cell.mode, cell.length, cell.initial) for cell in cells))
    initial = list(dict.fromkeys(cell.initial for cell in cells))
    lengths = list(dict.fromkeys(cell.length for cell in cells))
    for mode, length, ratio in kinds:
        line = [cell for cell in cells if (cell.mode, cell.length, cell.initial) == (mode, length, ratio)]
        line = [cell for cell in line if cell.within_two is not None]
        figure.add_scatter(
            x=[cell.noise for cell in line],
            y=[cell.within_two for cell in line],
            name=f"{mode} from {ratio:.3g}, x {length:g}",
            mode="lines+markers",
            line={
                "color": RUN_COLORS[initial.index(ratio) % len(RUN_COLORS)],
                "dash": "dot" if mode == "paper" else "solid",
                "width": 1 + lengths.index(length),
            },
            hovertemplate="noise %{x:.3g}: %{y:.0%}",
        )
    if all(cell.noise > 0 for cell in cells):
        figure.update_xaxes(type="log")
    figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%")
    figure.write_html(str(path), include_plotlyjs=True)
