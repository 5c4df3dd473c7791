"""What is judged a bad number, and what is decided: the state machine on its own."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from megatron_adalrs.adalrs.decision import Decision
from megatron_adalrs.checkpoint.train_state import TrainState
from megatron_adalrs.config import LossGuardConfig
from megatron_adalrs.training.loss_guard import REWIND, GuardEvent, LossGuard, LossMemory

BATCH = 8
NAN, INF = math.nan, math.inf


class Run:
    """A run of steps with given losses, as the trainer carries decisions out; a point to rewind to every
    `interval`."""

    def __init__(self, train_iters: int = 1000, scales_loss: bool = False, **settings: Any) -> None:
        self.machine = LossGuard(LossGuardConfig(**settings), train_iters, scales_loss)
        self.state, self.past = TrainState(), TrainState()

    def step(self, loss: float = 2.0, grad_norm: float = 1.0, applied: bool = True) -> Decision | None:
        self.state.advance(BATCH)
        decision = self.machine.observe((loss, grad_norm, applied), self.state, BATCH, 1.0, self.past)
        if decision:
            self.state.undo(decision.discarded_steps, BATCH, decision.skipped_samples)
            if decision.restore:
                self.state.restore_progress(self.past)
        return decision


def test_the_memory_is_mean_and_variance_and_forgets() -> None:
    losses = np.random.default_rng(0).normal(3.0, 0.2, 400)
    memory = LossMemory()
    for loss in losses[:100]:
        memory = memory.after(loss, 100)
    assert memory.mean == pytest.approx(losses[:100].mean()) and memory.variance == pytest.approx(
        losses[:100].var()
    )
    for loss in losses[100:]:
        memory = memory.after(loss + 1.0, 100)
    assert memory.mean == pytest.approx(4.0 - math.exp(-3), abs=0.05)


@pytest.mark.parametrize(
    ("numbers", "what"),
    [
        ((NAN, 1.0), "loss nan is not finite"),
        ((INF, INF), "loss inf is not"),
        ((2.0, NAN), "a gradient is not finite"),
    ],
)
def test_what_is_not_finite_is_found_from_the_first_step_on(numbers: tuple[float, float], what: str) -> None:
    run = Run(policy="skip")
    assert not run.machine.accepts(*numbers)
    decision = run.step(*numbers, applied=False)
    assert decision and decision.event is GuardEvent.SKIPPED and what in decision.reason


def test_a_spike_is_a_loss_beyond_sigma_once_there_is_a_history() -> None:
    run = Run(policy="skip", min_history=20, sigma=5.0)
    for index in range(19):
        assert run.step(2.0 + 0.1 * (-1) ** index) is None
        assert run.machine.accepts(1e9, 1.0)  # no history yet
    assert run.step(2.1) is None
    assert run.machine.accepts(2.4, 1.0) and not run.machine.accepts(2.6, 1.0)
    assert run.machine.accepts(-10.0, 1.0)  # a fall is no spike
    before = run.machine.memory
    decision = run.step(2.6, applied=False)
    assert decision and "loss 2.6 is above 2.01 + 5 x 0.099 = 2.507" in decision.reason
    assert run.machine.memory == before


def test_at_another_learning_rate_the_memory_begins_anew() -> None:
    run = Run(policy="skip", min_history=3)
    for loss in (2.0, 2.1, 2.0):
        run.machine.expect(3.0)
        run.step(loss)
    again = Run(policy="skip", min_history=3)
    again.machine.load_state_dict(json.loads(json.dumps(run.machine.state_dict())))
    for machine in (run.machine, again.machine):
        machine.expect(3.0)
        assert machine.memory.count == 3 and not machine.accepts(9.0, 1.0)
        machine.expect(3.0 * math.sqrt(3.0))
        assert machine.memory.count == 0 and machine.accepts(9.0, 1.0)


def test_losses_of_noise_are_no_spikes_and_a_slow_rise_is_none() -> None:
    run = Run(policy="skip")
    random = np.random.default_rng(1)
    for index in range(5000):
        assert run.step(10 / (1 + index / 50) + random.normal(0, 0.1) + index / 1000) is None


def test_skip_takes_the_step_back_and_passes_over_its_batch() -> None:
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


def test_rewind_goes_back_and_passes_over_everything_since_the_snapshot() -> None:
    run = Run(policy="rewind")
    run.past = TrainState(step=2, consumed_samples=16)
    for _ in range(5):
        run.step()
    decision = run.step(NAN)
    assert decision and decision.event is GuardEvent.REWOUND and decision.restore == REWIND
    assert (decision.step, decision.discarded_steps, decision.skipped_samples) == (2, 4, (16, 48))
    assert (run.state.step, run.state.next_sample, run.state.total_steps) == (2, 48, 6)
    run.step(NAN)  # at once again, from the same snapshot: one longer gap
    assert run.state.skipped_samples == ((16, 56),)


def test_gaps_that_touch_are_one_and_the_run_steps_over_all_of_them() -> None:
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


def test_stop_ends_where_the_batch_is_still_to_come() -> None:
    run = Run(policy="stop")
    run.step()
    decision = run.step(NAN, applied=False)
    assert decision and decision.event is GuardEvent.STOPPED and decision.skipped_samples is None
    assert (run.state.step, run.state.next_sample) == (1, 8)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_too_many_in_a_row_stop_the_run(policy: str) -> None:
    run = Run(policy=policy, max_consecutive=2)
    for _ in range(3):
        events = []
        for _ in range(2):
            run.past = TrainState(step=run.state.step, consumed_samples=run.state.consumed_samples)
            run.step()
            events.append(run.step(NAN, applied=policy == "rewind"))
        assert all(decision.event is not GuardEvent.STOPPED for decision in events)
        for _ in range(3):
            assert run.step() is None  # gets beyond
    events = [run.step(NAN, applied=policy == "rewind") for _ in range(3)]
    assert [decision.event is GuardEvent.STOPPED for decision in events] == [False, False, True]
    assert "max_consecutive is 2" in events[-1].reason
    assert run.step(NAN, applied=policy == "rewind").event is not GuardEvent.STOPPED  # resumed: chances anew


def test_passing_over_too_much_stops_the_run() -> None:
    run = Run(train_iters=20, policy="skip", max_skipped=0.1)
    events = []
    for _ in range(3):
        events.append(run.step(NAN, applied=False).event is GuardEvent.STOPPED)
        run.step()
    assert events == [False, False, True]


def test_an_overflow_is_the_loss_scales_business() -> None:
    run = Run(policy="skip", scales_loss=True, min_history=2)
    assert run.step(2.0, INF, applied=False) is None and run.state.step == 1
    assert run.step(NAN, INF, applied=False) is not None
    for loss in (2.0, 2.1, 2.0):
        assert run.step(loss) is None
    assert run.machine.memory.count == 3
    assert run.step(50.0, 1.0, applied=False) is not None  # a spike that was refused, and no overflow


def test_off_judges_nothing() -> None:
    run = Run()
    assert run.step(NAN, NAN) is None and run.machine.memory == LossMemory()


def test_the_state_survives_json() -> None:
    settings = {"policy": "skip", "min_history": 5}
    run, other = Run(**settings), Run(**settings)
    for index in range(30):
        run.step(NAN if index % 7 == 6 else 2 + 0.1 * math.sin(index), applied=index % 7 != 6)
    other.machine.load_state_dict(json.loads(json.dumps(run.machine.state_dict())))
    assert other.machine.state_dict() == run.machine.state_dict()
    assert TrainState(**json.loads(json.dumps(vars(run.state)))) == run.state
