"""Properties of robust mode for arbitrary losses and settings."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field

from hypothesis import event, given, settings
from hypothesis import strategies as st

from megatron_adalrs.adalrs import AdaLRSSettings, Controller, Decision, Event, build_controller
from megatron_adalrs.adalrs.decision import InMemoryRun, apply_decision

NO_LOSS = (math.nan, math.inf, -math.inf, 1.7e308, -1.7e308, 1e101)


@st.composite
def searches(draw: st.DrawFn) -> tuple[AdaLRSSettings, int]:
    short = draw(st.booleans())
    search = AdaLRSSettings(
        mode="robust",
        alpha=draw(st.sampled_from([3.0, 1.7, 10.0])),
        finest_factor=draw(st.sampled_from([1.6, 1.6, 1.1, 4.0])),
        confidence=draw(st.sampled_from([2.5, 2.5, 0.0, 20.0])),
        restart_confidence=draw(st.sampled_from([3.0, 0.0, -2.5])),
        min_scale=draw(st.sampled_from([1e-4, 1e-4, 0.2, 1.0])),
        max_scale=draw(st.sampled_from([1e4, 1e4, 20.0, 1.0])),
        max_discarded=draw(st.sampled_from([0.5, 0.5, 9.0, 0.8, 0.4, 0.1, 0.0])),
        budget=draw(st.sampled_from(["kept", "total"])),
        climb=draw(st.booleans()),
        climb_gain=draw(st.sampled_from([0.1, 0.0, 1e-3])),
        climb_steps=draw(st.integers(8, 12)) if short else None,
        trial_steps=draw(st.integers(1, 12)) if short else None,
        return_steps=draw(st.integers(10, 14)) if short else None,
        restart_steps=draw(st.integers(12, 20)) if short else None,
        search_end=draw(st.sampled_from([0.4, 0.5, 0.9])),
    )
    return search, draw(st.sampled_from([410, 500, 640]))


@dataclass(frozen=True)
class Landscape:
    """Loss in nats as a function of the step, its scale and the sum of all earlier log scales.

    With probability `accidents` a loss is not finite or a step is skipped.
    """

    seed: int
    gain: float
    noise: float
    accidents: float
    bad_above: float

    def __call__(self, step: int, log_scales: float, scale: float) -> tuple[float, bool]:
        source = random.Random(f"{self.seed} {step} {log_scales!r} {scale!r}")
        applied = source.random() >= self.accidents
        if source.random() < self.accidents or scale > self.bad_above:
            return source.choice(NO_LOSS), applied
        batch = random.Random(f"{self.seed} {step}").gauss(0, 1)
        level = 3 + 2 / (1 + step / 40) - self.gain * log_scales / 100 + self.noise * batch
        return level + 0.1 * self.noise * source.gauss(0, 1), applied


landscapes = st.builds(
    Landscape,
    seed=st.integers(0, 2**32),
    gain=st.sampled_from([0.5, 0.5, -0.5, -0.01, 0.0, 0.01]),
    noise=st.sampled_from([0.0, 0.01, 0.2]),
    accidents=st.sampled_from([0.0, 0.0, 0.0, 0.01, 0.2, 1.0]),
    bad_above=st.sampled_from([math.inf, math.inf, math.inf, 30.0, 1.0, 0.5, 0.0]),
)


@dataclass
class Trainer:
    """Applies decisions to a step and the rates so far, and checks that they are consistent."""

    controller: Controller
    losses: Landscape
    run: InMemoryRun[tuple[int, float]] = field(default_factory=lambda: InMemoryRun((0, 0.0)))
    """Run whose state consists of the number of kept steps and the sum of their log scales."""
    executed: int = 0
    decisions: list[Decision] = field(default_factory=list)

    def train(self, steps: int, saved_at: frozenset[int] = frozenset()) -> None:
        self.apply_decision(self.controller.resume())
        while self.run.state[0] + self.controller.schedule_offset < steps:
            step, log_scales = self.run.state
            scale = self.controller.scale
            loss, applied = self.losses(step, log_scales, scale)
            self.run.state = (step + 1, log_scales + math.log(scale))
            self.executed += 1
            self.apply_decision(self.controller.observe(loss, applied))
            if self.executed in saved_at:
                self.move_to_another_object(steps)

    def apply_decision(self, decision: Decision) -> None:
        if decision.event is not None:
            assert decision.reason and decision.discarded_steps >= 0
            apply_decision(decision, self.run)  # KeyError: no such snapshot
            assert decision.step == self.run.state[0]
            self.decisions.append(decision)
            if not self.controller.needs_initial:
                self.run.snapshots.pop("initial", None)
        assert self.controller.step == self.run.state[0]
        assert self.controller.scale == decision.scale_after

    def move_to_another_object(self, steps: int) -> None:
        state = json.loads(json.dumps(self.controller.state_dict()))
        self.controller = build_controller(self.controller.settings, steps)
        self.controller.load_state_dict(state)


@given(searches(), landscapes)
@settings(max_examples=80, deadline=None)
def test_every_sequence_of_decisions_is_legal(search: tuple[AdaLRSSettings, int], losses: Landscape) -> None:
    options, steps = search
    trainer = Trainer(build_controller(options, steps), losses)
    trainer.train(steps)
    plan = options.resolve(steps)
    for decision in trainer.decisions:
        event(decision.event.value)
        assert options.min_scale <= decision.scale_after <= options.max_scale
        if decision.event in (Event.ACCEPTED, Event.FAILED, Event.ABORTED):
            assert decision.restore or decision.event is Event.ACCEPTED
        if decision.event is not Event.INITIAL_KEPT:
            assert decision.step <= plan.search_end + 1
    assert [decision.event for decision in trainer.decisions].count(Event.SEARCH_ENDED) == 1
    assert trainer.decisions[-1].event is Event.SEARCH_ENDED
    assert trainer.controller.phase == "done" and not trainer.controller.has_pending_rollback
    discarded = sum(decision.discarded_steps for decision in trainer.decisions)
    assert discarded == trainer.executed - trainer.run.state[0]
    assert discarded <= math.floor(options.max_discarded * steps)
    assert trainer.controller.schedule_offset == (discarded if options.budget == "total" else 0)


@given(searches(), landscapes, st.frozensets(st.integers(1, 900), max_size=6))
@settings(max_examples=40, deadline=None)
def test_saving_at_any_step_changes_nothing(
    search: tuple[AdaLRSSettings, int], losses: Landscape, saved_at: frozenset[int]
) -> None:
    options, steps = search
    straight = Trainer(build_controller(options, steps), losses)
    straight.train(steps)
    saved = Trainer(build_controller(options, steps), losses)
    saved.train(steps, saved_at)
    # Compared as text because a gain may be NaN.
    assert repr(saved.decisions) == repr(straight.decisions)
    assert (saved.run.state, saved.executed) == (straight.run.state, straight.executed)
