"""Which runs an experiment consists of. A run is its configuration, and so is its name."""

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
"""alpha and beta; the defaults are 3 and 2."""
DECAYS = (1.0, 0.95)
"""lambda; the default is 0.99."""
Settings = tuple[tuple[str, Any], ...]
EQUAL_COMPUTE: Settings = (("budget", "total"),)
"""Discarded steps count: the run is as long as one at a fixed rate."""
_WARMUP, _FLOOR = 0.03, 0.1  # of the run, of the peak


@dataclass(frozen=True)
class Study:
    """A corpus and a width of the model: what learning rates are compared on."""

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
"""Goes on from checkpoints of `MAIN`, on the other corpus."""


@dataclass(frozen=True)
class Scale:
    """Length of the runs and how many of them."""

    name: str
    train_iters: int
    rates: tuple[float, ...]
    """Fixed learning rates of the grid."""
    ratios: tuple[float, ...]
    """Initial rates of searches, as multiples of the best fixed one."""
    schedules: tuple[str, ...] = SCHEDULES
    corpus_mb: float | None = None
    """Size of the sources that are read; None: all."""
    eval_iters: int = 80
    windows: tuple[int, ...] = (25, 70)
    """Of paper mode, to compare its default with: two have to fit between the warm-up and the start of the
    search."""
    paper_settings: Settings = ()
    """Of paper mode, where its defaults do not fit into the run."""
    continual_iters: int = 700
    """Length of the runs that go on from a checkpoint."""
    continual_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Their grid."""
    methods: tuple[str, ...] = METHODS
    """Which of `METHODS` train from the initial rates."""


_RATES = (1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 3e-2, 1e-1)
SCALES = {
    "tiny": Scale("tiny", 2000, _RATES, (1 / 30, 1 / 10, 1, 10)),
    "smoke": Scale(
        "smoke", 200, (1e-3, 3e-3), (1 / 10,), ("cosine",), 1.0, 5, (4,), (("window", 7),), 200, (1e-3, 3e-3)
    ),
}


@dataclass(frozen=True)
class Run:
    """One training. `settings`: fields of AdaLRS that are not at their defaults."""

    study: str
    schedule: str
    method: str
    """fixed, paper, robust, or one of `PEERS`."""
    lr: float
    seed: int
    settings: Settings = ()
    source_lr: float | None = None
    """It begins with the weights of `MAIN`'s run at this fixed rate, with the same schedule and seed; None:
    afresh."""

    @property
    def source(self) -> Run | None:
        return (
            None
            if self.source_lr is None
            else Run(MAIN.name, self.schedule, "fixed", self.source_lr, self.seed)
        )


def run_values(run: Run, scale: Scale) -> dict[str, Any]:
    """The configuration of a run, but for its paths: `finetune_from` is the name of another run.

    The model and the run are about those of the measurements that the robust mode was designed on: a
    byte-level GPT of two layers, steps of 512 tokens, 3 % warm-up, decay to a tenth.
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
        "adalrs": {"enabled": True, "mode": run.method, **settings} if is_search else {"enabled": False},
        **begins,
    }


def run_name(run: Run, values: dict[str, Any]) -> str:
    """A name for people, and eight digits of the configuration's hash: other settings are another run."""
    described = {name: value for name, value in asdict(run).items() if value is not None}
    identity = json.dumps([described, values], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return f"{run.study}-{run.schedule}-{run.method}-lr{run.lr:g}-seed{run.seed}-{digest}"


def scaled(rate: float, ratio: float) -> float:
    """The rate times the ratio, in three digits, so that it meets the grid's own rates."""
    return float(f"{rate * ratio:.3g}")


def grid_runs(
    study: Study, schedules: Sequence[str], scale: Scale, seeds: Sequence[int], source_lr: float | None = None
) -> list[Run]:
    """Fixed rates. `source_lr`: see `Run`; of `CONTINUAL` only."""
    places = [(schedule, lr) for schedule in schedules for lr in rates_of(study, scale)]
    return [
        Run(study.name, schedule, "fixed", lr, seed, (), source_lr)
        for schedule, lr in places
        for seed in seeds
    ]


def rates_of(study: Study, scale: Scale) -> tuple[float, ...]:
    """The grid of a study."""
    return scale.continual_rates if study == CONTINUAL else scale.rates


def studies_of(experiments: Sequence[str], scale: Scale) -> list[tuple[Study, tuple[str, ...]]]:
    """The studies whose grids the experiments build on, with the schedules that each needs; `MAIN` is the
    first."""
    chosen = set(experiments)
    main = scale.schedules if chosen & {"grid", "search"} else scale.schedules[:1]
    others = [(study, scale.schedules[:1]) for name, study in STUDIES.items() if name in chosen - {"grid"}]
    others += [(CONTINUAL, scale.schedules[:1])] if "continual" in chosen else []
    needs_main = chosen - (STUDIES.keys() - {"grid"})
    return [*([(MAIN, main)] if needs_main else []), *others]


def runs_after_grid(
    experiments: Sequence[str], scale: Scale, seeds: Sequence[int], best: Mapping[tuple[str, str], float]
) -> list[Run]:
    """Everything that starts from multiples of the best fixed rates, `best[study, schedule]`; no run
    twice."""
    runs: list[Run] = []
    first = scale.schedules[0]
    searched = [(MAIN, schedule) for schedule in scale.schedules if "search" in experiments]
    searched += [(STUDIES[name], first) for name in ("second-corpus", "larger-model") if name in experiments]
    for study, schedule in searched:
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


def continual_ratios(scale: Scale) -> list[float]:
    """Initial rates of searches that go on from a checkpoint, over the best fixed one."""
    return [ratio for ratio in scale.ratios if ratio in (1 / 10, 1, 10)] or list(scale.ratios)


def variants_of(experiments: Sequence[str], scale: Scale) -> dict[str, tuple[list[float], list[Settings]]]:
    """Tables of paper mode under other settings: initial rates over the best fixed one, and the settings."""
    tables: dict[str, tuple[list[float], list[Settings]]] = {}
    if "ablation" in experiments:
        tables["ablation"] = list(scale.ratios), [(), (("backtrack", False),)]
    if "factors" in experiments:
        ends = [ratio for ratio in scale.ratios if ratio in (1 / 10, 10)] or list(scale.ratios[:1])
        tables["factors"] = ends, [(), *((("alpha", alpha), ("beta", beta)) for alpha, beta in FACTORS)]
        windows = [(("window", window),) for window in scale.windows]
        tables["windows"] = ends[:1], [(), *windows, *((("decay", decay),) for decay in DECAYS)]
    return tables
