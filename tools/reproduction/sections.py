"""Which tables and plots a set of experiments makes."""

from __future__ import annotations

from collections.abc import Sequence

from . import plan
from .figures import grid_figure, search_figure
from .page import Section
from .plan import MAIN, STUDIES, Scale, scaled
from .tables import Results, cost_table, grid_table, peers_table, search_table, variants_table


def sections_of(results: Results, experiments: Sequence[str], scale: Scale) -> list[Section]:
    """The report's sections; those without a single run are left out."""
    sections = []
    for study, schedules in plan.studies_of(experiments, scale):
        for schedule in schedules:
            key = f"{study.name}-{schedule}"
            figure = grid_figure(results, study, schedule)
            sections.append(Section(grid_table(results, study, schedule), figure, f"grid-{key}"))
    searched = [(MAIN, schedule) for schedule in scale.schedules if "search" in experiments]
    searched += [
        (STUDIES[name], scale.schedules[0]) for name in ("second-corpus", "larger-model") if name in experiments
    ]
    for study, schedule in searched:
        best = results.best_rate(study.name, schedule, scale.rates)
        figure = search_figure(results, study, schedule, scale.ratios, best)
        table = search_table(results, study, schedule, scale.ratios, best)
        sections.append(Section(table, figure, f"search-{study.name}-{schedule}"))
        sections.append(Section(cost_table(results, study, schedule, scale.ratios, best)))
    sections += _variants(results, experiments, scale)
    if "peers" in experiments:
        best = results.best_rate(MAIN.name, scale.schedules[0], scale.rates)
        sections.append(Section(peers_table(results, MAIN, scale.schedules[0], best)))
    return [section for section in sections if section.table.rows]


def _variants(results: Results, experiments: Sequence[str], scale: Scale) -> list[Section]:
    sections = []
    titles = {
        "ablation": "With and without backtracking",
        "factors": "Factors",
        "windows": "Windows and decay of the factors",
    }
    schedule = scale.schedules[0]
    for name, (ratios, variants) in plan.variants_of(experiments, scale).items():
        best = results.best_rate(MAIN.name, schedule, scale.rates)
        rates = [scaled(best, ratio) for ratio in ratios]
        sections.append(Section(variants_table(results, MAIN, schedule, best, titles[name], rates, variants)))
    return sections
