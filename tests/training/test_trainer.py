"""The training loop with a real engine: a race or restart changes nothing but what it decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.adalrs.settings import AdaLRSSettings
from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.metrics.run_log import RunLog, read_run
from megatron_adalrs.optim.lr_schedule import build_schedule
from megatron_adalrs.training.build import build_trainer
from tests.helpers.ranks import Ranks
from tests.helpers.settings import TWO_LAYERS, counting_data
from tests.helpers.sinks import HeldSnapshots, Interrupt

STEPS = 160
NEVER = 1e9
SEARCH = {
    "mode": "robust",
    "alpha": 2.0,
    "search_start": 0.25,
    "search_end": 0.9,
    "trial_steps": 8,
    "return_steps": 10,
    "restart_steps": 12,
}


def values(data: Path, run: Path, search: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "preset": "llama-tiny",
        **TWO_LAYERS,
        **counting_data(data),
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_iters": STEPS,
        "lr": 1e-3,
        "eval_iters": 2,
        "eval_interval": 40,
        "hidden_dropout": 0.1,
        "zero_stage": 1,
        "run_dir": str(run),
        "adalrs": search,
    } | changes


def trained(config: dict[str, Any], ends_after: int | None = None) -> list[int]:
    """Train, and return how many snapshots were held after each decision.

    Args:
        ends_after: Executed steps after which a signal ends the run.
    """
    trainer = build_trainer(config_from_values(config))
    held = HeldSnapshots(trainer.rollback, "decision")
    trainer.metrics.add(held)
    trainer.metrics.add(Interrupt(lambda record: record["total_steps"] == ends_after))
    trainer.train()
    return held.counts


def kept(run: RunLog) -> list[tuple[int, float, float]]:
    columns = (run.train.step, run.train.loss, run.train.lr)
    return list(zip(*(column[run.train.kept].tolist() for column in columns), strict=True))


def fixed(ranks: Ranks, data: Path, folder: Path, lr: float) -> RunLog:
    ranks.run(trained, values(data, folder, {"mode": "off"}, lr=lr))
    return read_run(folder)


def test_lost_races_do_not_change_the_run(two_ranks: Ranks, data: Path, tmp_path: Path) -> None:
    search = SEARCH | {"confidence": NEVER, "min_scale": 1.0, "finest_factor": 1.1}
    (held, _) = two_ranks.run(trained, values(data, tmp_path / "raced", search))
    raced, plain = read_run(tmp_path / "raced"), fixed(two_ranks, data, tmp_path / "plain", 1e-3)
    assert kept(raced) == kept(plain)
    assert [evaluation.loss for evaluation in raced.evaluations][-2:] == [e.loss for e in plain.evaluations][
        -2:
    ]
    assert raced.totals.discarded_steps == sum(decision.discarded_steps for decision in raced.decisions) > 18
    assert max(held) == 2 and held[-1] == 0  # no restart may come, so none of the initial weights


def test_a_restart_equals_a_run_at_the_lower_rate(two_ranks: Ranks, data: Path, tmp_path: Path) -> None:
    # From a rate that ruins the weights, one restart at an eighth of it, a power of two for equal products.
    search = SEARCH | {"confidence": NEVER, "restart_confidence": -NEVER, "restart_factor": 8.0}
    search |= {"alpha": 8.0, "min_scale": 0.1, "max_discarded": 9.0}
    two_ranks.run(trained, values(data, tmp_path / "restarted", search, lr=0.8))
    restarted, plain = read_run(tmp_path / "restarted"), fixed(two_ranks, data, tmp_path / "plain", 0.1)
    assert restarted.scale == 0.125
    assert kept(restarted) == kept(plain)


def test_total_budget_includes_discarded_steps(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    search = SEARCH | {"confidence": NEVER, "min_scale": 1.0, "budget": "total"}
    one_rank.run(trained, values(data, tmp_path / "run", search))
    run = read_run(tmp_path / "run")
    discarded = run.totals.discarded_steps
    assert discarded > 0 and run.totals.total_steps == STEPS
    rates = [lr for _, _, lr in kept(run)]
    schedule = build_schedule(config_from_values(values(data, tmp_path, search)))
    climb = AdaLRSSettings(**search).resolve(STEPS).climb_start
    assert rates[:climb] == [1e-3 * schedule(step) for step in range(climb)]
    assert rates[-40:] == [1e-3 * schedule(step) for step in range(STEPS - 40, STEPS)]


def test_total_budget_a_restart_has_its_own_warmup(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    search = SEARCH | {"confidence": NEVER, "restart_confidence": -NEVER, "restart_factor": 8.0}
    search |= {"alpha": 8.0, "min_scale": 0.1, "budget": "total", "max_discarded": 1.0}
    config = values(data, tmp_path / "run", search, lr=0.8) | {"lr_warmup_iters": 12}
    one_rank.run(trained, config)
    run = read_run(tmp_path / "run")
    assert run.scale == 0.125 and run.totals.total_steps == STEPS
    schedule = build_schedule(config_from_values(config))
    assert [lr for _, _, lr in kept(run)][:12] == [0.1 * schedule(step) for step in range(12)]


@pytest.mark.parametrize("ends_after", [45, 62, 100], ids=str)
def test_an_interrupted_search_resumes_exactly(
    one_rank: Ranks, data: Path, tmp_path: Path, ends_after: int, whole: RunLog
) -> None:
    """The snapshots of the search are on disk."""
    run = tmp_path / "run"
    search = SEARCH | {"confidence": 0.0, "snapshot_dir": str(tmp_path)}
    one_rank.run(trained, values(data, run, search, lr=WHOLE_LR), ends_after)
    assert read_run(run).events[-1].event == "interrupted"
    one_rank.run(trained, values(data, run, search, lr=WHOLE_LR, load=str(run)))
    resumed = read_run(run)
    assert kept(resumed) == kept(whole)
    assert resumed.scale == whole.scale


WHOLE_LR = 5e-2


@pytest.fixture(scope="module")
def whole(one_rank: Ranks, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunLog:
    """Return an uninterrupted run, whose rate is such that the first race is lost and a restart is tried."""
    run = tmp_path_factory.mktemp("whole") / "run"
    one_rank.run(trained, values(data, run, SEARCH | {"confidence": 0.0}, lr=WHOLE_LR))
    return read_run(run)


def test_no_batches_turn_evaluation_off(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    search = {"mode": "off"}
    one_rank.run(trained, values(data, tmp_path / "run", search, train_iters=3, eval_iters=0))
    run = read_run(tmp_path / "run")
    assert len(run.train.loss) == 3
    assert not run.evaluations
