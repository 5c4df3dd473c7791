"""Properties of paper mode for arbitrary losses and settings."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field

from hypothesis import event, given, settings
from hypothesis import strategies as st

from megatron_adalrs.adalrs import AdaLRSSettings, Decision, Event, PaperController, SearchPlan
from megatron_adalrs.adalrs.decision import apply_decision

VERDICTS = {Event.ACCEPTED, Event.NEUTRAL, Event.FAILED, Event.ABORTED}
NO_LOSS = (math.nan, math.inf, -math.inf, 1.7e308, -1.7e308)


@st.composite
def searches(draw: st.DrawFn) -> tuple[AdaLRSSettings, SearchPlan]:
    search = AdaLRSSettings(
        mode="paper",
        alpha=draw(st.sampled_from([3.0, 1.5, 1.05])),
        beta=draw(st.sampled_from([2.0, 1.43, 1.05])),
        decay=draw(st.sampled_from([0.99, 0.8, 1.0])),
        decay_threshold=draw(st.sampled_from([1.0, 3.0, 0.5])),
        on_fail=draw(st.sampled_from(["down", "stay"])),
        min_scale=draw(st.sampled_from([1e-4, 0.4, 1.0])),
        max_scale=draw(st.sampled_from([1e4, 20.0, 5.0, 1.0])),
        max_discarded=draw(st.sampled_from([0.5, 0.5, 0.0, 0.2, 0.7])),
        budget=draw(st.sampled_from(["kept", "total"])),
    )
    window = draw(st.integers(3, 6))
    start = draw(st.integers(0, 7)) + 2 * window
    end = start + window + draw(st.sampled_from([40, 23, 7, 0]))
    return search, SearchPlan(window, start, end, end + draw(st.integers(0, 9)))


@dataclass(frozen=True)
class Landscape:
    """Losses as a function of step and scale, so that repeated steps have equal losses."""

    seed: int
    velocity: float
    gain: float
    noise: float
    accidents: float

    def __call__(self, step: int, scale: float) -> tuple[float, bool]:
        source = random.Random(f"{self.seed} {step} {scale!r}")
        applied = source.random() >= self.accidents
        if source.random() < self.accidents:
            return source.choice(NO_LOSS), applied
        progress = self.velocity * 20 * math.log1p(step / 20) + self.gain * math.log(scale) * step
        return 10 - progress + self.noise * source.gauss(0, 1), applied


landscapes = st.builds(
    Landscape,
    seed=st.integers(0, 2**32),
    velocity=st.sampled_from([0.2, 0.2, 0.01, -0.1]),
    gain=st.sampled_from([-0.3, -0.01, 0.0, 0.01, 0.3]),
    noise=st.sampled_from([0.01, 0.1, 0.0]),
    accidents=st.sampled_from([0.0, 0.01, 0.2]),
)


@dataclass
class Trainer:
    """Applies decisions to a step and a scale, and checks that they are consistent."""

    controller: PaperController
    losses: Landscape
    step: int = 0
    scale: float = 1.0
    snapshots: dict[str, tuple[int, float]] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)

    def run(self, steps: int, save: bool = False) -> None:
        for _ in range(steps):
            loss, applied = self.losses(self.step, self.scale)
            self.step += 1
            self.apply_decision(self.controller.observe(loss, applied))
            if save:
                self.move_to_a_new_process()

    def apply_decision(self, decision: Decision) -> None:
        assert decision.scale_before == self.scale
        step = self.step
        apply_decision(decision, self)
        assert decision.discarded_steps == step - self.step
        if decision.event in VERDICTS:
            self.snapshots.clear()  # no later decision restores an ended trial
        self.scale = decision.scale_after
        assert (self.controller.step, self.controller.scale) == (self.step, self.scale)
        if decision.event is not None:
            assert decision.step == self.step
            assert decision.reason
            self.decisions.append(decision)

    def capture(self, name: str) -> None:
        assert name not in self.snapshots
        self.snapshots[name] = (self.step, self.scale)

    def restore(self, name: str) -> None:
        self.step, self.scale = self.snapshots[name]

    def move_to_a_new_process(self) -> None:
        state = json.loads(json.dumps(self.controller.state_dict()))
        self.controller = PaperController(self.controller.settings, self.controller.plan)
        self.controller.load_state_dict(state)

    def interrupt_and_resume(self) -> None:
        was_in_trial = self.controller.phase == "trial"
        self.apply_decision(self.controller.interrupt())
        self.move_to_a_new_process()
        self.snapshots.clear()
        decision = self.controller.resume()
        assert (decision.capture is not None) == was_in_trial
        if was_in_trial:
            self.scale = decision.scale_before
            self.apply_decision(decision)

    def without_interruptions(self) -> list[Decision]:
        """Return the decisions without each interruption and the repeated decision after it."""
        kept: list[Decision] = []
        restart = False
        for decision in self.decisions:
            if decision.event is Event.INTERRUPTED:
                restart = True
            elif restart:
                assert decision == kept[-1]
                restart = False
            else:
                kept.append(decision)
        return kept


def steps_that_suffice(plan: SearchPlan) -> int:
    # Every window of the search may be followed by a trial that is undone.
    return plan.train_iters + plan.search_end


@given(searches(), landscapes)
@settings(max_examples=500, deadline=None)
def test_every_sequence_of_decisions_is_legal(
    search: tuple[AdaLRSSettings, SearchPlan], losses: Landscape
) -> None:
    options, plan = search
    trainer = Trainer(PaperController(options, plan), losses)
    trainer.run(steps_that_suffice(plan))
    in_trial = False
    for decision in trainer.decisions:
        event(decision.event.value)
        assert options.min_scale <= decision.scale_after <= options.max_scale
        assert (decision.event in VERDICTS) == in_trial
        in_trial = decision.event is Event.TRIAL_STARTED
        if in_trial:
            assert plan.search_start <= decision.step <= plan.search_end - plan.window
            assert decision.scale_after > decision.scale_before
        elif decision.event is Event.SCALED_DOWN:
            assert plan.search_start <= decision.step <= plan.search_end
            assert decision.scale_after <= decision.scale_before
        elif decision.event in VERDICTS:
            assert decision.discarded_steps <= plan.window
        else:
            assert decision.scale_after == decision.scale_before
    assert [d.event for d in trainer.decisions].count(Event.SEARCH_ENDED) == 1
    assert trainer.decisions[-1].event is Event.SEARCH_ENDED
    assert trainer.decisions[-1].step <= plan.search_end + 1
    assert trainer.controller.phase == "done"
    assert not trainer.snapshots
    discarded = sum(decision.discarded_steps for decision in trainer.decisions)
    assert discarded <= options.most_discarded(plan)
    assert trainer.controller.schedule_offset == (discarded if options.budget == "total" else 0)


@given(searches(), landscapes)
@settings(max_examples=60, deadline=None)
def test_saving_at_every_step_changes_nothing(
    search: tuple[AdaLRSSettings, SearchPlan], losses: Landscape
) -> None:
    options, plan = search
    straight = Trainer(PaperController(options, plan), losses)
    straight.run(steps_that_suffice(plan))
    saved = Trainer(PaperController(options, plan), losses)
    saved.run(steps_that_suffice(plan), save=True)
    assert saved.decisions == straight.decisions


@given(searches(), landscapes, st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=6))
@settings(max_examples=150, deadline=None)
def test_interrupting_at_any_step_changes_nothing(
    search: tuple[AdaLRSSettings, SearchPlan], losses: Landscape, stretches: list[tuple[bool, int]]
) -> None:
    options, plan = search
    straight = Trainer(PaperController(options, plan), losses)
    straight.run(steps_that_suffice(plan))
    broken = Trainer(PaperController(options, plan), losses)
    for wait_for_trial, steps in stretches:
        while wait_for_trial and broken.controller.phase not in ("trial", "done"):
            broken.run(1)
        broken.run(steps)
        event("interrupted in " + broken.controller.phase)
        broken.interrupt_and_resume()
    broken.run(steps_that_suffice(plan))
    assert broken.without_interruptions() == straight.decisions


@given(st.lists(st.tuples(st.floats(), st.booleans()), max_size=200))
@settings(max_examples=150, deadline=None)
def test_arbitrary_losses_are_accepted(losses: list[tuple[float, bool]]) -> None:
    plan = SearchPlan(window=3, search_start=8, search_end=60, train_iters=70)
    controller = PaperController(AdaLRSSettings(mode="paper"), plan)
    kept = 0
    for loss, applied in losses:
        decision = controller.observe(loss, applied)
        kept += 1 - decision.discarded_steps
        assert controller.step == kept
        json.dumps(controller.state_dict())
