"""The plain loop with other optimizers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.reproduction import corpus, plan
from megatron_adalrs.reproduction.plan import Run
from megatron_adalrs.training.build import build_trainer
from tests.helpers.ranks import Ranks
from tests.reproduction.made import SMOKE


def test_adamw_has_the_losses_of_the_trainer(one_rank: Ranks, tmp_path: Path) -> None:
    (ours, plain) = one_rank.run(losses_of_both, str(tmp_path))[0]
    assert len(ours) == 12
    assert plain == pytest.approx(ours, abs=1e-6)


def losses_of_both(folder: str) -> tuple[list[float], list[float]]:
    """Return the losses of a run with the trainer, and of the same run in the plain loop."""
    from megatron_adalrs.reproduction import peers

    corpus.prepare_corpora(Path(folder), {"code"}, limit_mb=0.3)
    values = plan.run_values(Run("code", "cosine", "fixed", 3e-3, 10), replace(SMOKE, train_iters=10))
    values |= {"data_path": f"{folder}/code", "eval_interval": 5, "eval_iters": 2}
    assert build_trainer(config_from_values(values | {"run_dir": f"{folder}/ours"})).train() == 0
    peers.train(config_from_values(values | {"run_dir": f"{folder}/plain"}), "adamw")

    def losses(name: str) -> list[float]:
        records = map(json.loads, Path(folder, name, "metrics.jsonl").read_text().splitlines())
        return [
            r["loss"]
            for r in records
            if r["kind"] == "train" or (r["kind"] == "eval" and r["split"] == "valid")
        ]

    return losses("ours"), losses("plain")


@pytest.mark.parametrize("kind", plan.RANGE_TESTS)
def test_a_range_test_reads_the_rate_off_its_losses(kind: str) -> None:
    from megatron_adalrs.reproduction import peers

    rates = [1e-6 * 10 ** (n / 10) for n in range(60)]  # to 1, ten a decade
    losses = [
        5.0 - 2 / (1 + math.exp(30 - n)) + 0.01 * abs(n - 45) for n in range(60)
    ]  # fall at 1e-3, rise from 3e-2
    expected = {"lr-range-test-steepest": 1e-3, "lr-range-test-tenth": 3e-3}[kind]
    for ending in ([], [math.inf, math.nan, 1.0]):
        found = peers.found_rate(kind, [*rates, 1, 1, 1][: 60 + len(ending)], losses + ending, 3)
        assert expected / 1.6 < found < 1.6 * expected
    with pytest.raises(ValueError, match=r"diverged after 7 steps, at a rate of 4e-06"):
        peers.found_rate(kind, rates, [*losses[:7], math.nan, *losses[7:]], 3)


def test_steps_of_a_range_test_count_as_discarded(one_rank: Ranks, tmp_path: Path) -> None:
    log = one_rank.run(after_a_range_test, str(tmp_path))[0]
    lr, loss, scale, kept, discarded = log
    assert (kept, discarded) == ([False] * 50 + [True] * 60, 50)
    assert lr[0] == pytest.approx(0.5e-6) and lr[49] == pytest.approx(0.5)
    assert lr[10] / lr[9] == pytest.approx(lr[49] / lr[48])
    assert loss[50] == loss[0] != loss[1], "the run must start with the weights and the batch of the test"
    assert max(lr[50:]) == pytest.approx(0.5 * scale) and lr[0] < 0.5 * scale < lr[49]


def after_a_range_test(folder: str) -> tuple[list[float], list[float], float, list[bool], int]:
    """Return rates, losses, the factor that was found, which steps were kept, and the number of others."""
    from megatron_adalrs.metrics.run_log import read_run
    from megatron_adalrs.reproduction import peers

    corpus.prepare_corpora(Path(folder), {"code"}, limit_mb=0.3)
    scale = replace(SMOKE, train_iters=60, eval_iters=2)
    values = plan.run_values(Run("code", "cosine", "lr-range-test-tenth", 0.5, 10), scale)
    values |= {"data_path": f"{folder}/code", "run_dir": f"{folder}/run", "lr_warmup_iters": 0}
    peers.train(config_from_values(values), "lr-range-test-tenth")
    log = read_run(Path(folder, "run"))
    train = log.train
    return train.lr.tolist(), train.loss.tolist(), log.scale, train.kept.tolist(), log.totals.discarded_steps
