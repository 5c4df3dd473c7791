"""The loss guard without an engine: which steps are faulty, and what is decided about them."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from megatron_adalrs.adalrs.decision import Decision
from megatron_adalrs.checkpoint.train_state import TrainState
from megatron_adalrs.config import LossGuardConfig
from megatron_adalrs.engine import StepResult
from megatron_adalrs.training.loss_guard import (
    REWIND,
    GuardEvent,
    LossGuard,
    LossStatistics,
    NoLossGuard,
    build_loss_guard,
)
from tests.helpers.runs import tiny_config

BATCH = 8
NAN, INF = math.nan, math.inf


class Run:
    """Steps with given losses, in which decisions are applied as the trainer applies them.

    `rewind_to` is the progress at the last snapshot.
    """

    def __init__(self, train_iters: int = 1000, scales_loss: bool = False, **settings: Any) -> None:
        self.guard = LossGuard(LossGuardConfig(**settings), train_iters, scales_loss)
        self.state = TrainState()
        self.rewind_to = TrainState()

    def step(self, loss: float | None = 2.0, grad_norm: float = 1.0, applied: bool = True) -> Decision | None:
        self.state.advance(BATCH)
        result = StepResult(loss, grad_norm, applied, stop_requested=False)
        decision = self.guard.observe(result, self.state, BATCH, 1.0, self.rewind_to)
        if decision:
            self.state.undo(decision.discarded_steps, BATCH, decision.skipped_samples)
            if decision.restore:
                self.state.restore_progress(self.rewind_to)
        return decision

    def faulty_step(self, loss: float, grad_norm: float = 1.0, applied: bool = True) -> Decision:
        decision = self.step(loss, grad_norm, applied)
        assert decision is not None
        return decision


def test_statistics_are_mean_and_variance_and_forget() -> None:
    losses = np.random.default_rng(0).normal(3.0, 0.2, 400)
    statistics = LossStatistics()
    for loss in losses[:100]:
        statistics = statistics.after(loss, 100)
    assert statistics.mean == pytest.approx(losses[:100].mean())
    assert statistics.variance == pytest.approx(losses[:100].var())
    for loss in losses[100:]:
        statistics = statistics.after(loss + 1.0, 100)
    assert statistics.mean == pytest.approx(4.0 - math.exp(-3), abs=0.05)


@pytest.mark.parametrize(
    ("numbers", "what"),
    [
        ((NAN, 1.0), "loss nan is not finite"),
        ((INF, INF), "loss inf is not"),
        ((2.0, NAN), "a gradient is not finite"),
    ],
)
def test_nonfinite_numbers_are_found_from_first_step(numbers: tuple[float, float], what: str) -> None:
    run = Run(policy="skip")
    assert not run.guard.accepts(*numbers)
    decision = run.step(*numbers, applied=False)
    assert decision and decision.event is GuardEvent.SKIPPED and what in decision.reason


def test_a_spike_is_a_loss_beyond_sigma_of_history() -> None:
    run = Run(policy="skip", min_history=20, sigma=5.0)
    for index in range(19):
        assert run.step(2.0 + 0.1 * (-1) ** index) is None
        assert run.guard.accepts(1e9, 1.0)  # no history yet
    assert run.step(2.1) is None
    assert run.guard.accepts(2.4, 1.0) and not run.guard.accepts(2.6, 1.0)
    assert run.guard.accepts(-10.0, 1.0)  # a fall is no spike
    before = run.guard.statistics
    decision = run.step(2.6, applied=False)
    assert decision and "loss 2.6 is above 2.01 + 5 x 0.099 = 2.507" in decision.reason
    assert run.guard.statistics == before


def test_another_scale_resets_the_statistics() -> None:
    run = Run(policy="skip", min_history=3)
    for loss in (2.0, 2.1, 2.0):
        run.guard.before_step(3.0)
        run.step(loss)
    again = Run(policy="skip", min_history=3)
    again.guard.load_state_dict(json.loads(json.dumps(run.guard.state_dict())))
    for guard in (run.guard, again.guard):
        guard.before_step(3.0)
        assert guard.statistics.count == 3 and not guard.accepts(9.0, 1.0)
        guard.before_step(3.0 * math.sqrt(3.0))
        assert guard.statistics.count == 0 and guard.accepts(9.0, 1.0)


def test_noise_and_a_slow_rise_are_no_spikes() -> None:
    run = Run(policy="skip")
    random = np.random.default_rng(1)
    for index in range(5000):
        assert run.step(10 / (1 + index / 50) + random.normal(0, 0.1) + index / 1000) is None


def test_skip_undoes_the_step_and_skips_its_batch() -> None:
    run = Run(policy="skip", extra_skipped_batches=2)
    for _ in range(3):
        run.step()
    decision = run.step(NAN, applied=False)
    assert decision and decision.step == 3 and decision.discarded_steps == 1 and decision.restore is None
    assert decision.skipped_samples == (24, 48)
    state = run.state
    assert (state.step, state.total_steps, state.guard_undone_steps) == (3, 4, 1)
    assert (state.consumed_samples, state.next_sample) == (24, 48)
    run.step()
    assert (state.step, state.consumed_samples, state.used_samples) == (4, 56, 32)


def test_rewind_skips_everything_since_the_snapshot() -> None:
    run = Run(policy="rewind")
    run.rewind_to = TrainState(step=2, consumed_samples=16)
    for _ in range(5):
        run.step()
    decision = run.step(NAN)
    assert decision and decision.event is GuardEvent.REWOUND and decision.restore == REWIND
    assert (decision.step, decision.discarded_steps, decision.skipped_samples) == (2, 4, (16, 48))
    assert (run.state.step, run.state.next_sample, run.state.total_steps) == (2, 48, 6)
    run.step(NAN)  # at once again, from the same snapshot: one longer gap
    assert run.state.skipped_samples == ((16, 56),)


def test_adjacent_gaps_are_merged_and_skipped() -> None:
    run = Run(policy="skip")
    for loss in (2.0, NAN, NAN, 2.0, NAN, 2.0):
        run.step(loss, applied=math.isfinite(loss))
    assert run.state.skipped_samples == ((8, 24), (32, 40))
    run.state.restore_progress(TrainState())  # as a restart does
    starts = []
    for _ in range(4):
        starts.append(run.state.next_sample)
        run.step()
    assert starts == [0, 24, 40, 48]


def test_stop_ends_before_the_faulty_batch() -> None:
    run = Run(policy="stop")
    run.step()
    decision = run.step(NAN, applied=False)
    assert decision and decision.event is GuardEvent.STOPPED and decision.skipped_samples is None
    assert (run.state.step, run.state.next_sample) == (1, 8)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_too_many_consecutive_faults_stop_the_run(policy: str) -> None:
    run = Run(policy=policy, max_consecutive=2)
    for _ in range(3):
        events = []
        for _ in range(2):
            run.rewind_to = TrainState(step=run.state.step, consumed_samples=run.state.consumed_samples)
            run.step()
            events.append(run.faulty_step(NAN, applied=policy == "rewind"))
        assert all(decision.event is not GuardEvent.STOPPED for decision in events)
        for _ in range(3):
            assert run.step() is None  # gets beyond
    events = [run.faulty_step(NAN, applied=policy == "rewind") for _ in range(3)]
    assert [decision.event is GuardEvent.STOPPED for decision in events] == [False, False, True]
    assert "max_consecutive is 2" in events[-1].reason
    assert (
        run.faulty_step(NAN, applied=policy == "rewind").event is not GuardEvent.STOPPED
    )  # resumed: chances anew


def test_skipping_too_much_stops_the_run() -> None:
    run = Run(train_iters=20, policy="skip", max_skipped=0.1)
    events = []
    for _ in range(3):
        events.append(run.faulty_step(NAN, applied=False).event is GuardEvent.STOPPED)
        run.step()
    assert events == [False, False, True]


def test_an_overflow_is_left_to_the_loss_scaler() -> None:
    run = Run(policy="skip", scales_loss=True, min_history=2)
    assert run.step(2.0, INF, applied=False) is None and run.state.step == 1
    assert run.step(NAN, INF, applied=False) is not None
    for loss in (2.0, 2.1, 2.0):
        assert run.step(loss) is None
    assert run.guard.statistics.count == 3
    assert run.step(50.0, 1.0, applied=False) is not None  # a spike that was refused, and no overflow


def test_a_step_without_a_loss_is_sound() -> None:
    run = Run(policy="skip")
    run.step(2.0)
    before = run.guard.state_dict()
    assert run.step(None, grad_norm=0.0, applied=False) is None
    assert run.guard.state_dict() == before


def test_without_a_policy_every_step_is_accepted() -> None:
    guard = build_loss_guard(tiny_config())
    assert isinstance(guard, NoLossGuard)
    assert guard.before_step(2.0) is None
    state = TrainState(step=1, consumed_samples=BATCH, total_steps=1)
    assert guard.observe(StepResult(NAN, NAN, True, False), state, BATCH, 1.0, None) is None
    assert guard.statistics == LossStatistics() and guard.state_dict() == {}


def test_a_policy_can_be_turned_on_and_off_on_resume() -> None:
    run = Run(policy="skip")
    run.step()
    NoLossGuard().load_state_dict(run.guard.state_dict())
    run.guard.load_state_dict(NoLossGuard().state_dict())
    assert run.guard.statistics.count == 1
    assert isinstance(build_loss_guard(tiny_config(loss_guard={"policy": "skip"})), LossGuard)


def test_the_state_survives_json() -> None:
    settings: dict[str, Any] = {"policy": "skip", "min_history": 5}
    run, other = Run(**settings), Run(**settings)
    for index in range(30):
        run.step(NAN if index % 7 == 6 else 2 + 0.1 * math.sin(index), applied=index % 7 != 6)
    other.guard.load_state_dict(json.loads(json.dumps(run.guard.state_dict())))
    assert other.guard.state_dict() == run.guard.state_dict()
    assert TrainState(**json.loads(json.dumps(vars(run.state)))) == run.state
