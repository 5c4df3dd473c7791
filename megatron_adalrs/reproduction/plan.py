"""Plan of the experiments: the runs of each, their configurations and their names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SCHEDULES = ("cosine", "WSD")
EXPERIMENTS = ("grid", "search", "ablation", "factors", "continual", "peers", "second-corpus", "larger-model")
RANGE_TESTS = ("lr-range-test-steepest", "lr-range-test-tenth")
METHODS = ("fixed", "paper", "robust")
PEERS = ("prodigy", "schedulefree", *RANGE_TESTS)
FACTORS = ((2.0, 1.67), (1.5, 1.43))
"""Values of alpha and beta; the defaults are 3 and 2."""
DECAYS = (1.0, 0.95)
"""Values of lambda; the default is 0.99."""
Settings = tuple[tuple[str, Any], ...]
EQUAL_COMPUTE: Settings = (("budget", "total"),)
"""Setting with which discarded steps count, so that a run is as long as one at a fixed rate."""
_WARMUP = 0.03
"""Length of the warm-up as a share of the run."""
_FLOOR = 0.1
"""Last learning rate as a share of the peak."""


@dataclass(frozen=True)
class Study:
    """A corpus and a model width. Learning rates are compared within a study."""

    name: str
    corpus: str
    hidden_size: int


MAIN = Study("code", "code", 32)
STUDIES = {
    "grid": MAIN,
    "second-corpus": Study("prose", "prose", 32),
    "larger-model": Study("wide", "code", 72),
}
CONTINUAL = Study("continual", "prose", 32)
"""Continues from checkpoints of `MAIN` on the other corpus."""


@dataclass(frozen=True)
class Scale:
    """Length and number of the runs."""

    name: str
    train_iters: int
    rates: tuple[float, ...]
    """Fixed learning rates of the grid."""
    ratios: tuple[float, ...]
    """Initial rates of searches as multiples of the best fixed one."""
    schedules: tuple[str, ...] = SCHEDULES
    corpus_mb: float | None = None
    """Size in 10^6 bytes of the sources that are read; None for all."""
    eval_iters: int = 80
    windows: tuple[int, ...] = (25, 70)
    """Windows of paper mode that are compared with the default. Two must fit between the warm-up and the
    start of the search."""
    paper_settings: Settings = ()
    """Settings of paper mode, if its defaults do not fit into the run."""
    continual_iters: int = 700
    """Length of the runs that continue from a checkpoint."""
    continual_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Fixed learning rates of these runs."""
    methods: tuple[str, ...] = METHODS
    """Methods that train from the initial rates."""


_RATES = (1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 3e-2, 1e-1)
SCALES = {
    "tiny": Scale("tiny", 2000, _RATES, (1 / 30, 1 / 10, 1, 10)),
    "smoke": Scale(
        "smoke", 200, (1e-3, 3e-3), (1 / 10,), ("cosine",), 1.0, 5, (4,), (("window", 7),), 200, (1e-3, 3e-3)
    ),
}


@dataclass(frozen=True)
class Run:
    """One training run."""

    study: str
    schedule: str
    method: str
    """fixed, paper, robust, or one of `PEERS`."""
    lr: float
    seed: int
    settings: Settings = ()
    """Settings of AdaLRS that are not at their defaults."""
    source_lr: float | None = None
    """Fixed rate of the run of `MAIN`, with the same schedule and seed, whose weights this run starts from;
    None for random weights."""

    @property
    def source(self) -> Run | None:
        """Run whose weights this run starts from."""
        if self.source_lr is None:
            return None
        return Run(MAIN.name, self.schedule, "fixed", self.source_lr, self.seed)


def run_values(run: Run, scale: Scale) -> dict[str, Any]:
    """Return the configuration of a run without its paths; `finetune_from` is the name of another run.

    The runs resemble those with which the robust mode was designed: a byte-level GPT of two layers, steps of
    512 tokens, 3 % warm-up, decay to a tenth.
    """
    study = next(study for study in (*STUDIES.values(), CONTINUAL) if study.name == run.study)
    train_iters = scale.continual_iters if run.source else scale.train_iters
    begins = {"finetune_from": run_name(run.source, run_values(run.source, scale))} if run.source else {}
    is_search = run.method in ("paper", "robust")
    settings = {**dict(scale.paper_settings if run.method == "paper" else ()), **dict(run.settings)}
    return {
        "preset": "gpt2-tiny",
        "num_layers": 2,
        "hidden_size": study.hidden_size,
        "num_attention_heads": 4,
        "seq_length": 64,
        "split": "90,10,0",
        "micro_batch_size": 8,
        "train_iters": train_iters,
        "lr": run.lr,
        "min_lr": _FLOOR * run.lr,
        "lr_decay_style": run.schedule,
        "lr_warmup_iters": round(_WARMUP * train_iters),
        "seed": run.seed,
        "eval_interval": max(1, train_iters // 20),
        "eval_iters": scale.eval_iters,
        "log_interval": 1000,
        "adalrs": {"mode": run.method, **settings} if is_search else {"mode": "off"},
        **begins,
    }


def run_name(run: Run, values: dict[str, Any]) -> str:
    """Return a readable name that ends with eight digits of the configuration's hash."""
    described = {name: value for name, value in asdict(run).items() if value is not None}
    identity = json.dumps([described, values], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return f"{run.study}-{run.schedule}-{run.method}-lr{run.lr:g}-seed{run.seed}-{digest}"


def scaled(rate: float, ratio: float) -> float:
    """Return `rate * ratio`, rounded to three digits so that it can equal a rate of the grid."""
    return float(f"{rate * ratio:.3g}")


def grid_runs(
    study: Study, schedules: Sequence[str], scale: Scale, seeds: Sequence[int], source_lr: float | None = None
) -> list[Run]:
    """Return the runs of a study at fixed rates; `source_lr` is that of `Run`, for `CONTINUAL` only."""
    places = [(schedule, lr) for schedule in schedules for lr in rates_of(study, scale)]
    return [
        Run(study.name, schedule, "fixed", lr, seed, (), source_lr)
        for schedule, lr in places
        for seed in seeds
    ]


def rates_of(study: Study, scale: Scale) -> tuple[float, ...]:
    """Return the fixed rates of a study."""
    return scale.continual_rates if study == CONTINUAL else scale.rates


def studies_of(experiments: Sequence[str], scale: Scale) -> list[tuple[Study, tuple[str, ...]]]:
    """Return the studies whose grids the experiments need, `MAIN` first, with the schedules of each."""
    chosen = set(experiments)
    main = scale.schedules if chosen & {"grid", "search"} else scale.schedules[:1]
    others = [(study, scale.schedules[:1]) for name, study in STUDIES.items() if name in chosen - {"grid"}]
    others += [(CONTINUAL, scale.schedules[:1])] if "continual" in chosen else []
    needs_main = chosen - (STUDIES.keys() - {"grid"})
    return [*([(MAIN, main)] if needs_main else []), *others]


def runs_after_grid(
    experiments: Sequence[str], scale: Scale, seeds: Sequence[int], best: Mapping[tuple[str, str], float]
) -> list[Run]:
    """Return the runs that start from multiples of the best fixed rates, without duplicates.

    Args:
        experiments: Names of the experiments.
        scale: Length and number of the runs.
        seeds: Seeds of each run.
        best: Best fixed rate by study and schedule.
    """
    runs: list[Run] = []
    first = scale.schedules[0]
    for study, schedule in searches_of(experiments, scale):
        for ratio in scale.ratios:
            lr = scaled(best[study.name, schedule], ratio)
            runs += [
                Run(study.name, schedule, method, lr, seed) for method in scale.methods for seed in seeds
            ]
            if "robust" in scale.methods:
                runs += [Run(study.name, schedule, "robust", lr, seed, EQUAL_COMPUTE) for seed in seeds]
    for ratios, variants in variants_of(experiments, scale).values():
        for ratio in ratios:
            lr = scaled(best[MAIN.name, first], ratio)
            runs += [Run(MAIN.name, first, "fixed", lr, seed) for seed in seeds]
            runs += [
                Run(MAIN.name, first, "paper", lr, seed, settings) for settings in variants for seed in seeds
            ]
    if "continual" in experiments:
        source = best[MAIN.name, first]
        for ratio in continual_ratios(scale):
            lr = scaled(best[CONTINUAL.name, first], ratio)
            methods = [(method, seed) for method in scale.methods for seed in seeds]
            runs += [Run(CONTINUAL.name, first, method, lr, seed, (), source) for method, seed in methods]
    if "peers" in experiments:
        rates = [scaled(best[MAIN.name, first], ratio) for ratio in scale.ratios]
        runs += [
            Run(MAIN.name, first, method, 1.0, seed) for method in ("prodigy", *RANGE_TESTS) for seed in seeds
        ]
        runs += [Run(MAIN.name, "constant", "schedulefree", lr, seed) for lr in rates for seed in seeds]
    return list(dict.fromkeys(runs))


def searches_of(experiments: Sequence[str], scale: Scale) -> list[tuple[Study, str]]:
    """Return the studies and schedules in which searches start from multiples of the best fixed rate."""
    searches = [(MAIN, schedule) for schedule in scale.schedules if "search" in experiments]
    others = [STUDIES[name] for name in ("second-corpus", "larger-model") if name in experiments]
    return searches + [(study, scale.schedules[0]) for study in others]


def continual_ratios(scale: Scale) -> list[float]:
    """Return the initial rates of continual runs as multiples of the best fixed one."""
    return [ratio for ratio in scale.ratios if ratio in (1 / 10, 1, 10)] or list(scale.ratios)


def variants_of(experiments: Sequence[str], scale: Scale) -> dict[str, tuple[list[float], list[Settings]]]:
    """Return the comparisons of paper mode with other settings.

    Returns:
        By name of the comparison: initial rates as multiples of the best fixed one, and the settings.
    """
    tables: dict[str, tuple[list[float], list[Settings]]] = {}
    if "ablation" in experiments:
        tables["ablation"] = list(scale.ratios), [(), (("backtrack", False),)]
    if "factors" in experiments:
        ends = [ratio for ratio in scale.ratios if ratio in (1 / 10, 10)] or list(scale.ratios[:1])
        tables["factors"] = ends, [(), *((("alpha", alpha), ("beta", beta)) for alpha, beta in FACTORS)]
        windows = [(("window", window),) for window in scale.windows]
        tables["windows"] = ends[:1], [(), *windows, *((("decay", decay),) for decay in DECAYS)]
    return tables
