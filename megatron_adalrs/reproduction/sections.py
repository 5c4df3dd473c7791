"""Which tables and plots a set of experiments makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_adalrs.reproduction import plan
from megatron_adalrs.reproduction.comparison import Results
from megatron_adalrs.reproduction.figures import grid_figure, search_figure
from megatron_adalrs.reproduction.page import Section
from megatron_adalrs.reproduction.plan import CONTINUAL, MAIN, STUDIES, Scale, Study, scaled
from megatron_adalrs.reproduction.tables import (
    cost_table,
    grid_table,
    peers_table,
    search_table,
    variants_table,
)


def sections_of(results: Results, experiments: Sequence[str], scale: Scale) -> list[Section]:
    """The report's sections; those without a single run are left out."""
    sections = []
    for study, schedules in plan.studies_of(experiments, scale):
        for schedule in schedules:
            key = f"{study.name}-{schedule}"
            best = results.best_rate(study.name, schedule, plan.rates_of(study, scale))
            table = grid_table(results, study, schedule, best)
            sections.append(Section(table, grid_figure(results, study, schedule), f"grid-{key}"))
    searched = [(MAIN, schedule) for schedule in scale.schedules if "search" in experiments]
    searched += [
        (STUDIES[name], scale.schedules[0])
        for name in ("second-corpus", "larger-model")
        if name in experiments
    ]
    for study, schedule in searched:
        best = results.best_rate(study.name, schedule, scale.rates)
        sections += _searches(results, study, schedule, scale.ratios, best)
    sections += _variants(results, experiments, scale)
    if "continual" in experiments:
        sections += _continual(results, scale)
    if "peers" in experiments:
        best = results.best_rate(MAIN.name, scale.schedules[0], scale.rates)
        sections.append(Section(peers_table(results, MAIN, scale.schedules[0], best)))
    return [section for section in sections if section.table.rows]


def cluster_sections(
    results: Results, preset: str, schedules: Sequence[str], rates: Sequence[float]
) -> list[Section]:
    """The report on what a cluster has completed so far; schedules without a fixed run have nothing to
    compare with."""
    sections = []
    study = Study(preset, "", 0)
    for schedule in schedules:
        if results.rates(preset, schedule):
            best = results.best_rate(preset, schedule)
            figure = grid_figure(results, study, schedule)
            sections.append(Section(grid_table(results, study, schedule, best), figure, f"grid-{schedule}"))
            sections += _searches(results, study, schedule, [rate / best for rate in rates], best)
    return [section for section in sections if section.table.rows]


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
    words = (
        f"Continual pretraining: {scale.continual_iters} steps on {CONTINUAL.corpus} from the weights that "
        f"{scale.train_iters} steps on {MAIN.corpus} at the best fixed rate ({source:g}, {schedule}, the "
        f"same seed) "
        f"ended with, with a fresh optimizer, warm-up, schedule and search. The goals in brackets are those "
        f"of runs "
        "that begin afresh."
    )
    return [replace(search, table=replace(search.table, caption=f"{words} {search.table.caption}")), cost]


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
