"""Numbers that go wrong on one rank: every policy does what it says, on all ranks, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.metrics.run_log import RunLog, read_run
from megatron_adalrs.training.build import build_trainer
from megatron_adalrs.training.trainer import INTERRUPTED, STOPPED
from tests.data.corpora import counting_corpus
from tests.helpers.faults import Fault
from tests.helpers.ranks import Ranks

STEPS, BATCH = 9, 8
CELLS = {
    "zero1": {"zero_stage": 1},
    "zero3": {"zero_stage": 3},
    "pipe": {"pipeline_model_parallel_size": 2, "zero_stage": 1},
}
FAULTS = {3: "loss", 4: "gradient", 8: "spike"}
"""By batch of the data."""
SKIPPED = ((3 * BATCH, 5 * BATCH), (8 * BATCH, 9 * BATCH))
REWOUND = ((2 * BATCH, 5 * BATCH), (7 * BATCH, 9 * BATCH))
"""With snapshots at every second kept step: the fourth is that of the seventh batch."""
Spans = tuple[tuple[int, int], ...]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return counting_corpus(tmp_path_factory.mktemp("data") / "counting")


def values(data: Path, run: Path, policy: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    settings = {"rewind_interval": 2, "min_history": 4, "max_skipped": 0.7} | changes.get("loss_guard", {})
    return (
        {
            "preset": "gpt2-tiny",
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "seq_length": 16,
            "vocab_size": 50,
            "data_path": str(data),
            "split": "8,1,1",
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
) -> tuple[int, Any, int, int]:
    """Train where batches of the data go wrong on one rank. Exit code, state, most points of the past at a
    time, and losses in memory.

    Args:
        skipped_samples: what the run is to know from the start.
    """
    trainer = build_trainer(config_from_values(config))
    fault = Fault(trainer.engine, rank=trainer.mesh.world_size - 1 if trainer.mesh.pipe.size == 1 else 0)
    serve, held = trainer.batches.micro_batches, [0]

    def served(position: int) -> Any:
        fault.kind = faults.get(position // BATCH, "")
        held.append(len(trainer.rollback))
        return serve(position)

    trainer.batches.micro_batches = served
    trainer.state.skipped_samples += skipped_samples
    return trainer.train(), trainer.state, max(held), trainer.loss_guard.statistics.count


def kept(run: RunLog) -> list[tuple[int, float, float, float]]:
    columns = (run.train.step, run.train.loss, run.train.grad_norm, run.train.lr)
    return list(zip(*(column[run.train.kept].tolist() for column in columns), strict=True))


class Runs:
    """Runs of a test, compared by what they keep."""

    def __init__(self, ranks: Ranks, data: Path, folder: Path, changes: Mapping[str, Any]) -> None:
        self._ranks, self._data, self._folder, self._changes = ranks, data, folder, changes

    def train(
        self, name: str, policy: str, faults: Mapping[int, str], *arguments: Any, **changes: Any
    ) -> tuple[Any, ...]:
        """What `trained` returns, the same on all ranks."""
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
def test_every_policy_does_what_it_says(two_ranks: Ranks, data: Path, tmp_path: Path, cell: str) -> None:
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


def test_the_policy_leaves_a_sound_run_alone(one_rank: Ranks, data: Path, tmp_path: Path) -> None:
    runs = Runs(one_rank, data, tmp_path, {"zero_stage": 1, "hidden_dropout": 0.1})
    runs.train("off", "off", {})
    for policy in ("skip", "rewind"):
        assert runs.train(policy, policy, {})[0] == 0
        assert kept(runs[policy]) == kept(runs["off"])
        assert runs[policy].events[0].data_order == runs["off"].events[0].data_order


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_resuming_is_exact(one_rank: Ranks, data: Path, tmp_path: Path, policy: str) -> None:
    """From a checkpoint between faults: the memory of losses and what is passed over are in it."""
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
def test_a_run_that_nothing_helps_stops(
    one_rank: Ranks, data: Path, tmp_path: Path, policy: str, stops_at: int
) -> None:
    runs = Runs(one_rank, data, tmp_path, {"loss_guard": {"max_consecutive": 2}})
    code, state, *_ = runs.train("run", policy, dict.fromkeys(range(5, 99), "loss"))
    assert (code, state.step) == (STOPPED, stops_at)
    assert len(runs.events("run")) == 3 and "max_consecutive is 2" in str(runs["run"].events[-1].message)
    # Its state is sound. What was passed over stays so without a policy, too.
    code, resumed, *_ = runs.train("run", "off", {}, load=str(tmp_path / "run"))
    assert code == 0 and resumed.skipped_samples == state.skipped_samples


SEARCH = {
    "enabled": True,
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
}
SEARCHING = {"train_iters": 40, "lr": 0.1, "adalrs": SEARCH, "loss_guard": {"sigma": 1e9}}


@pytest.mark.parametrize(
    ("policy", "skipped_samples"),
    [
        ("skip", ((5 * BATCH, 6 * BATCH), (20 * BATCH, 21 * BATCH))),
        ("rewind", ((4 * BATCH, 6 * BATCH), (18 * BATCH, 21 * BATCH))),
    ],
)
def test_outside_of_trials_the_policy_holds_during_a_search(
    one_rank: Ranks, data: Path, tmp_path: Path, policy: str, skipped_samples: Spans
) -> None:
    """Before the first race and in its control. Its trial and a restart then see the same batches as their
    controls, so all goes as if the data did not have what is passed over."""
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
def test_a_trial_is_its_searchs_own_business(
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
    """Train; the third step of the first trial goes wrong."""
    trainer = build_trainer(config_from_values(config))
    fault, step, in_trial = Fault(trainer.engine, rank=0), trainer.step, [0]

    def stepped(stop: bool = False) -> Any:
        is_in_trial = trainer.controller.phase == "trial"
        in_trial[0] += is_in_trial
        fault.kind = "loss" if is_in_trial and in_trial[0] == 3 else ""
        return step(stop)

    trainer.step = stepped
    assert trainer.train() == 0
