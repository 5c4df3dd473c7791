"""Loss guard with a real engine: a fault on one rank has the same consequence on all ranks, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.checkpoint.train_state import TrainState
from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.metrics.run_log import RunLog, read_run
from megatron_adalrs.training.build import build_trainer
from megatron_adalrs.training.trainer import INTERRUPTED, STOPPED
from tests.helpers.faults import Fault
from tests.helpers.ranks import Ranks
from tests.helpers.settings import TWO_LAYERS, counting_data
from tests.helpers.sinks import HeldSnapshots, TrialSteps

STEPS, BATCH = 9, 8
CELLS = {
    "zero1": {"zero_stage": 1},
    "zero3": {"zero_stage": 3},
    "pipe": {"pipeline_model_parallel_size": 2, "zero_stage": 1},
}
FAULTS = {3: "loss", 4: "gradient", 8: "spike"}
"""Kind of fault by batch of the data."""
SKIPPED = ((3 * BATCH, 5 * BATCH), (8 * BATCH, 9 * BATCH))
REWOUND = ((2 * BATCH, 5 * BATCH), (7 * BATCH, 9 * BATCH))
"""Snapshots are taken at every second kept step; the fourth one comes before the seventh batch."""
Spans = tuple[tuple[int, int], ...]


def values(data: Path, run: Path, policy: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    settings = {"rewind_interval": 2, "min_history": 4, "max_skipped": 0.7} | changes.get("loss_guard", {})
    return (
        {
            "preset": "gpt2-tiny",
            **TWO_LAYERS,
            **counting_data(data),
            "micro_batch_size": 2,
            "global_batch_size": BATCH,
            "train_iters": STEPS,
            "lr": 1e-3,
            "eval_iters": 1,
            "run_dir": str(run),
            "check_ranks_every": STEPS,
        }
        | changes
        | {"loss_guard": settings | {"policy": policy}}
    )


def trained(
    config: dict[str, Any], faults: Mapping[int, str], skipped_samples: Spans = ()
) -> tuple[int, TrainState, int, int]:
    """Train with faults on one rank.

    Args:
        faults: Kind of fault by batch of the data.
        skipped_samples: Samples that the run skips from the start.

    Returns:
        Exit code, progress, highest number of snapshots held at a time, and number of losses in the
        statistics.
    """
    trainer = build_trainer(config_from_values(config))
    rank = trainer.mesh.world_size - 1 if trainer.mesh.pipe.size == 1 else 0
    Fault(trainer.engine, rank, lambda: faults.get(trainer.state.next_sample // BATCH, ""))
    held = HeldSnapshots(trainer.rollback, "train")
    trainer.metrics.add(held)
    trainer.state.skipped_samples += skipped_samples
    exit_code = trainer.train()
    return exit_code, trainer.state, max(held.counts), trainer.loss_guard.statistics.count


def kept(run: RunLog) -> list[tuple[int, float, float, float]]:
    columns = (run.train.step, run.train.loss, run.train.grad_norm, run.train.lr)
    return list(zip(*(column[run.train.kept].tolist() for column in columns), strict=True))


class Runs:
    """Runs of a test by name."""

    def __init__(self, ranks: Ranks, data: Path, folder: Path, changes: Mapping[str, Any]) -> None:
        self._ranks, self._data, self._folder, self._changes = ranks, data, folder, changes

    def train(
        self, name: str, policy: str, faults: Mapping[int, str], *arguments: Any, **changes: Any
    ) -> tuple[Any, ...]:
        """Train on all ranks, check that they agree, and return the result of `trained`."""
        config = values(self._data, self._folder / name, policy, {**self._changes, **changes})
        first, *others = self._ranks.run(trained, config, faults, *arguments)
        for other in others:
            first[1].snapshot_seconds = other[1].snapshot_seconds
            assert other == first
        return first

    def __getitem__(self, name: str) -> RunLog:
        return read_run(self._folder / name)

    def events(self, name: str) -> list[str]:
        return [
            decision.event for decision in self[name].decisions if decision.event.startswith("loss_guard")
        ]

    def checkpoint(self, name: str, step: int) -> str:
        return str(self._folder / name / "checkpoints" / f"iter_{step:07}")


@pytest.mark.parametrize("cell", CELLS)
def test_faults_are_handled_by_each_policy(two_ranks: Ranks, data: Path, tmp_path: Path, cell: str) -> None:
    runs = Runs(two_ranks, data, tmp_path, CELLS[cell])
    # What a stage of a pipeline puts out is no loss.
    faults = FAULTS | ({8: "gradient"} if cell == "pipe" else {})

    code, state, *_ = runs.train("skip", "skip", faults)
    assert (code, state.step, state.total_steps, state.guard_undone_steps) == (0, STEPS, STEPS + 3, 3)
    assert state.skipped_samples == SKIPPED
    assert runs.events("skip") == ["loss_guard_skipped"] * 3
    assert len(kept(runs["skip"])) == STEPS
    if cell == "zero1":  # that a refused update changes nothing is tested in every cell by itself
        runs.train("without them", "skip", {}, SKIPPED)
        assert kept(runs["skip"]) == kept(runs["without them"])
    assert runs["skip"].totals.discarded_steps == 3
    assert runs["skip"].totals.useful_tokens == STEPS * BATCH * 16

    code, state, held, _ = runs.train("rewind", "rewind", faults, hidden_dropout=0.1)
    assert (code, state.step, held) == (0, STEPS, 1)
    assert state.skipped_samples == REWOUND
    assert runs.events("rewind") == ["loss_guard_rewound"] * 3
    runs.train("without those", "rewind", {}, REWOUND, hidden_dropout=0.1)
    assert kept(runs["rewind"]) == kept(runs["without those"]) and len(kept(runs["rewind"])) == STEPS
    assert runs["rewind"].totals.discarded_steps == state.guard_undone_steps == 2 + 1 + 2

    code, state, *_ = runs.train("stop", "stop", faults)
    assert (code, state.step, state.next_sample) == (STOPPED, 3, 3 * BATCH)
    assert runs.events("stop") == ["loss_guard_stopped"]
    code, *_ = runs.train("stop", "skip", faults, load=str(tmp_path / "stop"))
    assert code == 0 and kept(runs["stop"]) == kept(runs["skip"])


def test_a_policy_does_not_change_a_sound_run(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    runs = Runs(one_rank, data, tmp_path, {"zero_stage": 1, "hidden_dropout": 0.1})
    runs.train("off", "off", {})
    for policy in ("skip", "rewind"):
        assert runs.train(policy, policy, {})[0] == 0
        assert kept(runs[policy]) == kept(runs["off"])
        assert runs[policy].events[0].data_order == runs["off"].events[0].data_order


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_resuming_is_exact(one_rank: Ranks, data: Path, tmp_path: Path, policy: str) -> None:
    """A checkpoint between two faults contains the loss statistics and the skipped samples."""
    faults = {1: "loss", 9: "spike"}
    runs = Runs(one_rank, data, tmp_path, {"save_interval": 5, "loss_guard": {"rewind_interval": 3}})
    _, whole, *_ = runs.train("whole", policy, faults)
    assert len(runs.events("whole")) == 2
    code, *_ = runs.train("parted", policy, faults, exit_interval=5)
    assert code == INTERRUPTED
    _, resumed, *_ = runs.train("parted", policy, faults, load=str(tmp_path / "parted"))
    assert kept(runs["parted"]) == kept(runs["whole"])
    assert (
        resumed.skipped_samples == whole.skipped_samples
        and resumed.guard_undone_steps == whole.guard_undone_steps
    )


@pytest.mark.parametrize(("policy", "stops_at"), [("skip", 5), ("rewind", 4)])
def test_a_run_with_persistent_faults_stops(
    one_rank: Ranks, data: Path, tmp_path: Path, policy: str, stops_at: int
) -> None:
    runs = Runs(one_rank, data, tmp_path, {"loss_guard": {"max_consecutive": 2}})
    code, state, *_ = runs.train("run", policy, dict.fromkeys(range(5, 99), "loss"))
    assert (code, state.step) == (STOPPED, stops_at)
    assert len(runs.events("run")) == 3 and "max_consecutive is 2" in str(runs["run"].events[-1].message)
    # The saved state is sound. Skipped samples stay skipped, even without a policy.
    code, resumed, *_ = runs.train("run", "off", {}, load=str(tmp_path / "run"))
    assert code == 0 and resumed.skipped_samples == state.skipped_samples


SEARCH = {
    "mode": "robust",
    "alpha": 8.0,
    "search_start": 0.4,
    "search_end": 0.9,
    "trial_steps": 2,
    "return_steps": 10,
    "restart_steps": 12,
    "confidence": 1e9,
    "restart_confidence": -1e9,
    "restart_factor": 3.0,
    "min_scale": 0.1,
    "max_discarded": 9.0,
}
SEARCHING = {"train_iters": 40, "lr": 0.1, "adalrs": SEARCH, "loss_guard": {"sigma": 1e9}}


@pytest.mark.parametrize(
    ("policy", "skipped_samples"),
    [
        ("skip", ((5 * BATCH, 6 * BATCH), (20 * BATCH, 21 * BATCH))),
        ("rewind", ((4 * BATCH, 6 * BATCH), (18 * BATCH, 21 * BATCH))),
    ],
)
def test_the_policy_applies_outside_of_trials(
    one_rank: Ranks, data: Path, tmp_path: Path, policy: str, skipped_samples: Spans
) -> None:
    """Faults before the first race and in its control are skipped.

    Its trial and a restart then use the same batches as their controls, as if the data did not contain the
    skipped samples.
    """
    runs = Runs(one_rank, data, tmp_path, SEARCHING)
    _, state, held, remembered = runs.train("run", policy, {5: "loss", 20: "gradient"})
    assert state.skipped_samples == skipped_samples and len(runs.events("run")) == 2
    assert held <= 4 + (policy == "rewind")
    assert remembered == 40 - 16  # the steps since the restart was accepted, none of trials
    runs.train("without them", policy, {}, skipped_samples)
    assert kept(runs["run"]) == kept(runs["without them"]) and len(kept(runs["run"])) == 40
    verdicts = [
        [(d.event, d.step, d.scale_after, d.gain) for d in runs[name].decisions if d.gain is not None]
        for name in ("run", "without them")
    ]
    assert verdicts[0] == verdicts[1] and "accepted" in [event for event, *_ in verdicts[0]]  # the restart


@pytest.mark.parametrize("policy", ["skip", "rewind", "stop"])
def test_a_fault_in_a_trial_is_left_to_the_search(
    one_rank: Ranks, data: Path, tmp_path: Path, policy: str
) -> None:
    one_rank.run(
        trial_spoiled,
        values(data, tmp_path / "run", policy, SEARCHING | {"adalrs": SEARCH | {"min_scale": 1.0}}),
    )
    run = read_run(tmp_path / "run")
    events = [decision.event for decision in run.decisions]
    assert "aborted" in events and not [event for event in events if event.startswith("loss_guard")]
    assert len(kept(run)) == 40


def trial_spoiled(config: dict[str, Any]) -> None:
    """Train with a fault in the third step of the first trial."""
    trainer = build_trainer(config_from_values(config))
    completed = TrialSteps()
    trainer.metrics.add(completed)

    def fault() -> str:
        return "loss" if trainer.controller.phase == "trial" and completed.count == 2 else ""

    Fault(trainer.engine, rank=0, choose=fault)
    assert trainer.train() == 0
