"""The paired race on a toy whose loss, like a training loss, depends on all rates so far, the batch and this rate."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from megatron_adalrs.adalrs.controller import Decision, Event, RobustController, build_controller
from megatron_adalrs.adalrs.plans import RacePlan
from megatron_adalrs.adalrs.settings import AdaLRSSettings

N = 1000
NOISE = np.random.default_rng(0).normal(0.0, 0.05, 4 * N)  # of a batch: both arms of a race see the same


@dataclass(frozen=True)
class Weights:
    step: int = 0
    level: float = 5.0
    damaged: bool = False
    path: tuple[float, ...] = ()
    """The scale of every step that made them."""

    def trained(self, scale: float, best: float) -> Weights:
        off = abs(math.log(scale / best))
        damaged = self.damaged or scale > 8 * best
        speed = 0.004 * max(0.1, 1 - (off / 3) ** 2) * (0.2 if damaged else 1.0)
        return Weights(self.step + 1, self.level * (1 - speed), damaged, (*self.path, scale))

    def loss(self, scale: float) -> float:
        return self.level + 0.01 * math.log(scale) + NOISE[self.step]  # a higher rate looks worse while it lasts


@dataclass
class Run:
    """A trainer of the toy, which carries decisions out as the real one does."""

    controller: RobustController
    best: float
    told: Callable[[Weights, float], float] = Weights.loss
    weights: Weights = field(default_factory=Weights)
    executed: int = 0
    decisions: list[Decision] = field(default_factory=list)
    snapshots: dict[str, Weights] = field(default_factory=dict)

    def train(self, until: Callable[[Run], bool] = lambda run: False) -> Run:
        self.carry_out(self.controller.resume())
        while self.weights.step + self.controller.ahead < N and not until(self):
            scale = self.controller.scale
            trained = self.weights.trained(scale, self.best)
            loss = self.told(self.weights, scale)
            self.weights = trained
            self.executed += 1
            self.carry_out(self.controller.observe(loss))
        return self

    def carry_out(self, decision: Decision) -> None:
        if decision.event is None:
            return
        self.decisions.append(decision)
        if decision.capture:
            self.snapshots[decision.capture] = self.weights
        if decision.restore:
            self.weights = self.snapshots[decision.restore]
        assert self.weights.step == self.controller.step == decision.step

    def restarted(self) -> Run:
        """The same run in a new process: the state went through a file, the snapshots are gone."""
        state = json.loads(json.dumps(self.controller.state_dict()))
        controller = RobustController(self.controller.settings, self.controller.plan)
        controller.load_state_dict(state)
        again = replace(self, controller=controller, snapshots={})
        if controller.needs_initial:
            again.snapshots["initial"] = Weights()
        return again

    def events(self) -> list[str]:
        return [decision.event.value for decision in self.decisions]


def start(best: float, told: Callable[[Weights, float], float] = Weights.loss, **values: Any) -> Run:
    controller = build_controller(AdaLRSSettings(enabled=True, mode="robust", **values), N)
    assert isinstance(controller, RobustController)
    return Run(controller, best, told)


def at_fixed_rate(best: float, scale: float = 1.0) -> Weights:
    weights = Weights()
    while weights.step < N:
        weights = weights.trained(scale, best)
    return weights


def test_a_rate_that_is_too_small_is_raised() -> None:
    run = start(best=9.0).train()
    assert run.controller.scale == pytest.approx(9.0, rel=0.8)
    assert run.weights.level < at_fixed_rate(9.0).level - 0.05
    first = next(d for d in run.decisions if d.event is Event.ACCEPTED)
    assert first.gain > first.threshold > 0 and first.gain_error > 0
    assert (first.scale_before, first.scale_after) == (1.0, 3.0)


def test_at_the_best_rate_nothing_changes_but_the_steps_that_are_discarded() -> None:
    run = start(best=1.0).train()
    assert run.weights == at_fixed_rate(1.0)
    assert run.controller.scale == 1.0 and "accepted" not in run.events()
    assert run.executed - N == sum(decision.discarded_steps for decision in run.decisions) > 0


def test_a_rate_that_did_damage_is_lowered_from_the_first_step_on() -> None:
    run = start(best=0.1).train()
    assert not run.weights.damaged
    assert run.weights.path[0] == pytest.approx(1 / 9) or run.weights.path[0] == pytest.approx(1 / 27)
    assert run.weights.level < at_fixed_rate(0.1).level - 0.5
    assert run.executed - N == sum(decision.discarded_steps for decision in run.decisions)


def test_races_are_judged_at_equal_rates_on_equal_batches() -> None:
    """While it lasts a lower rate looks better here, and yet no rate is lowered."""
    run = start(best=1.0, climb=False)
    arms: dict[str, list[tuple[int, float]]] = {"control": [], "trial": []}

    def told(weights: Weights, scale: float) -> float:
        if run.controller.phase in arms:
            arms[run.controller.phase].append((weights.step, scale))
        return weights.loss(scale)

    run.told = told
    plan = run.controller.plan
    run.train(lambda run: run.events().count("failed") == 1)
    assert [step for step, _ in arms["control"]][: plan.race_steps] == [step for step, _ in arms["trial"]]
    assert [scale for _, scale in arms["trial"]] == [3.0] * plan.trial_steps + [1.0] * plan.return_steps


def test_the_factor_shrinks_with_every_race_that_is_lost() -> None:
    run = start(best=1.0).train()
    lost = [decision for decision in run.decisions if decision.event in (Event.FAILED, Event.ABORTED)]
    up = [decision.scale_before for decision in lost if decision.scale_before > 1]
    assert up == pytest.approx([3.0, math.sqrt(3.0)])
    plain = start(best=1.0, climb=False).train()
    lost = [decision for decision in plain.decisions if decision.event in (Event.FAILED, Event.ABORTED)]
    assert [d.scale_before for d in lost if d.scale_before > 1] == pytest.approx([3.0, math.sqrt(3.0)])


def far_below(weights: Weights, scale: float) -> float:
    """A loss that falls as fast as the rate is high, up to 27."""
    return 5.0 - 0.02 * sum(min(1.0, each / 27.0) for each in weights.path) + 0.001 * NOISE[weights.step]


def test_a_rate_far_too_small_is_raised_right_after_the_warm_up() -> None:
    run = start(30.0, far_below, climb_gain=0.1)
    run.train(lambda run: run.weights.step == run.controller.plan.search_start)
    climbs = [decision for decision in run.decisions if decision.event is Event.ACCEPTED]
    assert [decision.scale_after for decision in climbs] == pytest.approx([3.0, 9.0, 27.0])
    plan = run.controller.plan
    first, last = plan.climb_start, plan.climb_start + 3 * plan.climb_steps
    assert [decision.step for decision in climbs] == list(range(first + plan.climb_steps, last + 1, plan.climb_steps))
    assert run.executed - run.weights.step == 4 * plan.climb_steps  # three controls and the trial that was lost
    after = plan.search_start - last - plan.climb_steps
    assert run.weights.path[last:] == pytest.approx((27.0,) * plan.climb_steps + (27.0 * math.sqrt(3.0),) * after)
    assert climbs[0].gain > climbs[0].threshold > 0.1 * 0.02


@pytest.mark.parametrize(("share", "scale"), [(0.6, 9.0), (0.2, 3.0 * math.sqrt(3.0))])
def test_once_the_climb_has_raised_the_rate_it_ends_above_or_between(share: float, scale: float) -> None:
    """The second race gains that share of what the first one needed, and not for sure."""
    needed = 0.05  # 1 % of the 5 that the loss falls by before any race

    def told(weights: Weights, scale: float) -> float:
        gained = (1.0 if scale > 1 else 0.0) + (share * needed + 0.2 * (-1) ** weights.step if scale > 3 else 0.0)
        return 10.0 - 5.0 * (weights.step >= 8) - gained

    run = start(30.0, told).train(lambda run: run.weights.step == run.controller.plan.search_start)
    races = [decision for decision in run.decisions if decision.event in (Event.ACCEPTED, Event.FAILED)]
    assert races[0].threshold == pytest.approx(needed) and races[1].threshold == pytest.approx(0.4 * 0.01 * 6.0)
    assert 0 < races[1].gain < 2.5 * races[1].gain_error
    assert races[1].scale_after == pytest.approx(scale)


def test_a_climb_whose_last_trial_was_worse_for_sure_stays_where_it_was() -> None:
    def told(weights: Weights, scale: float) -> float:
        return 10.0 - 5.0 * (weights.step >= 8) - (1.0 if scale > 1 else 0.0) + (0.1 if scale > 3 else 0.0)

    run = start(30.0, told).train(lambda run: run.weights.step == run.controller.plan.search_start)
    assert run.controller.scale == pytest.approx(3.0)


def test_a_climb_leaves_a_rate_that_is_not_far_too_small() -> None:
    """A trial that is better for sure, but by less than a tenth of what the loss has fallen by, is for a full race."""
    run = start(30.0, lambda weights, scale: far_below(weights, scale) - 0.1 * weights.step, climb_gain=0.1)
    run.train(lambda run: run.weights.step == run.controller.plan.search_start)
    lost = next(decision for decision in run.decisions if decision.event is Event.FAILED)
    assert lost.threshold > lost.gain > 10 * lost.gain_error
    assert run.weights.path == (1.0,) * run.controller.plan.search_start


def test_a_lost_climb_leaves_a_full_race_whatever_the_factor() -> None:
    run = start(best=1.0, alpha=2.0).train()
    up = [decision.scale_before for decision in run.decisions if decision.event in (Event.FAILED, Event.ABORTED)]
    assert [scale for scale in up if scale > 1] == [2.0, 2.0]


def test_where_the_climb_shows_a_rate_too_large_the_restart_comes_at_once() -> None:
    """Whatever a full race at a rate that did damage would say: here the first is won, and so would hide it."""

    def told(weights: Weights, scale: float) -> float:
        return weights.loss(scale) - (0.5 if weights.step > 100 and max(weights.path) > 1.5 else 0.0)

    run = start(0.1, told, finest_factor=1.5, alpha=3.0).train()
    restarts = [index for index, decision in enumerate(run.decisions) if decision.restore == "initial"]
    full = [index for index, decision in enumerate(run.decisions) if "steps, then at" in decision.reason]
    assert 0 < restarts[0] < full[0]
    won = next(decision for decision in run.decisions if decision.event is Event.ACCEPTED)
    assert won.step == run.controller.plan.climb_start + run.controller.plan.climb_steps
    assert run.controller.scale < 1 and not run.weights.damaged
    late = start(0.1, told, climb=False).train()
    assert late.controller.scale > 1 and late.weights.damaged


@pytest.mark.parametrize(("behind", "again"), [(0.3, True), (1.0, False)])
def test_an_early_restart_that_is_lost_but_not_by_far_is_tried_again(behind: float, again: bool) -> None:
    """The damage shows late: at first a new run lies above the old one, whose loss has fallen by some 2, then below."""

    def told(weights: Weights, scale: float) -> float:
        is_new = weights.path[:1] < (1.0,)
        off = (behind if weights.step < 36 else -0.5) if is_new else 0.0
        return 5.0 - 0.06 * min(weights.step, 50) + off + (0.3 if scale > 1 else 0.0) + 0.1 * NOISE[weights.step]

    run = start(1.0, told).train()
    new_runs = [decision.step for decision in run.decisions if decision.restore == "initial"]
    assert len(new_runs) >= 2 if again else len(new_runs) == 1
    assert run.weights.path[0] < 1 if again else run.weights.path == (1.0,) * N


def test_a_climb_that_shows_nothing_leaves_the_first_word_to_a_full_race() -> None:
    run = start(1.0, lambda weights, scale: 5.0 - 0.001 * weights.step + NOISE[weights.step]).train()
    restart = next(index for index, decision in enumerate(run.decisions) if decision.restore == "initial")
    assert any("steps, then at" in decision.reason for decision in run.decisions[:restart])
    assert sum(decision.restore == "initial" for decision in run.decisions) == 1


def test_a_rate_that_was_raised_is_not_restarted_at_a_lower_one() -> None:
    run = start(30.0, far_below).train(lambda run: run.controller.scale > 1 and run.controller.phase == "control")
    assert not run.controller.needs_initial
    run.train()
    assert not any(decision.restore == "initial" for decision in run.decisions)


def test_without_room_before_the_races_there_is_no_climb() -> None:
    plan = AdaLRSSettings(mode="robust").resolve(2000, 180)
    assert (plan.most_climbs, plan.climb_start) == (0, 180)
    assert "climb" not in str(plan) and "climb" not in str(AdaLRSSettings(mode="robust", climb=False).resolve(2000))
    run = start(30.0, far_below, climb=False).train(lambda run: run.weights.step == 100)
    assert run.executed == 100


@pytest.mark.parametrize("bad", [math.nan, math.inf, 80.0])
def test_a_trial_that_diverges_ends_at_once(bad: float) -> None:
    def told(weights: Weights, scale: float) -> float:
        return bad if scale > 1 else weights.loss(scale)

    run = start(best=9.0, told=told).train()
    aborted = [decision for decision in run.decisions if decision.event is Event.ABORTED]
    assert aborted and all(decision.discarded_steps <= 8 for decision in aborted if decision.scale_before > 1)
    assert all(decision.gain is None or decision.gain < decision.threshold < 0 for decision in aborted)
    assert run.weights.path == (1.0,) * N


def test_a_run_of_losses_that_are_no_numbers_is_restarted_at_a_lower_rate() -> None:
    def told(weights: Weights, scale: float) -> float:
        return weights.loss(scale) if scale < 0.2 else math.nan

    run = start(best=0.1, told=told).train()
    assert max(run.weights.path) < 0.2


def test_a_lost_restart_goes_back_to_the_control() -> None:
    run = start(best=1.0).train()
    events = run.events()
    assert "caught_up" in events or "aborted" in events
    assert run.weights.path == (1.0,) * N


@pytest.mark.parametrize("factor", [2.0**-10, 2.0**10])
@pytest.mark.parametrize("best", [0.1, 1.0, 9.0])
def test_verdicts_do_not_depend_on_the_unit_of_the_loss(best: float, factor: float) -> None:
    """The same run in other units: a corpus, a model or a vocabulary of another loss changes no threshold."""
    run = start(best).train()
    scaled = start(best, told=lambda weights, scale: factor * weights.loss(scale)).train()
    assert scaled.events() == run.events()
    assert scaled.weights.path == run.weights.path


@pytest.mark.parametrize("values", [{"min_scale": 1.0}, {"max_discarded": 0.15}], ids=str)
def test_no_initial_weights_are_kept_where_no_restart_may_come(values: dict[str, float]) -> None:
    run = start(best=0.1, **values).train()
    assert "initial" not in run.snapshots and min(run.weights.path) == 1.0
    assert "initial" in start(best=0.1).train().snapshots


def test_nothing_is_left_to_undo_where_a_checkpoint_may_be_saved() -> None:
    run = start(best=9.0, climb=False)
    run.train(lambda run: run.controller.phase == "trial")
    assert run.controller.undecided
    with pytest.raises(RuntimeError, match=r"call interrupt\(\) first"):
        run.restarted().train()
    run.carry_out(run.controller.interrupt())
    assert not run.controller.undecided and run.weights.step == run.controller.plan.search_start


@pytest.mark.parametrize("best", [0.1, 1.0, 9.0])
def test_the_state_may_go_through_a_file_after_every_step(best: float) -> None:
    def moved(run: Run) -> bool:
        run.controller = run.restarted().controller
        return False

    whole, run = start(best).train(), start(best).train(moved)
    assert run.decisions == whole.decisions and run.weights == whole.weights


@settings(max_examples=60, deadline=None)
@given(
    best=strategies.sampled_from([0.02, 0.1, 1.0, 9.0]),
    cuts=strategies.lists(strategies.integers(1, 900), min_size=1, max_size=4),
    budget=strategies.sampled_from([{}, {"budget": "total"}, {"max_discarded": 0.3}]),
)
def test_interrupting_and_resuming_anywhere_changes_nothing(
    best: float, cuts: list[int], budget: dict[str, Any]
) -> None:
    whole = start(best, **budget).train()
    run = start(best, **budget)
    for cut in cuts:
        ends_at = run.executed + cut
        run.train(lambda run, ends_at=ends_at: run.executed >= ends_at)
        run.carry_out(run.controller.interrupt())
        run = run.restarted()
    run.train()
    assert run.weights == whole.weights and run.controller.scale == whole.controller.scale
    assert run.controller.ahead == whole.controller.ahead
    assert run.executed - run.weights.step == sum(decision.discarded_steps for decision in run.decisions)


@settings(max_examples=40, deadline=None)
@given(best=strategies.floats(0.01, 30.0), share=strategies.floats(0.0, 0.6))
def test_the_budget_of_discarded_steps_is_kept(best: float, share: float) -> None:
    run = start(best, max_discarded=share).train()
    assert run.executed - N <= share * N


@settings(max_examples=60, deadline=None)
@given(
    best=strategies.floats(0.01, 30.0),
    share=strategies.none() | strategies.floats(0.0, 0.9),
    cuts=strategies.lists(strategies.integers(1, 900), max_size=2),
)
def test_with_the_total_budget_a_run_ends_when_so_many_steps_were_executed(
    best: float, share: float | None, cuts: list[int]
) -> None:
    run = start(best, max_discarded=share, budget="total")
    repeated = 0
    for cut in cuts:
        ends_at = run.executed + cut
        run.train(lambda run, ends_at=ends_at: run.executed >= ends_at)
        decision = run.controller.interrupt()
        repeated += decision.discarded_steps
        run.carry_out(decision)
        run = run.restarted()
    run.train()
    assert run.controller.phase == "done" and not run.controller.undecided
    assert run.weights.step + run.controller.ahead == N
    assert run.controller.ahead <= (0.5 if share is None else share) * N
    if not cuts:
        assert run.executed == N
    assert run.executed - run.weights.step == sum(decision.discarded_steps for decision in run.decisions)


def test_both_arms_are_at_the_same_point_of_the_schedule() -> None:
    """The schedule counts what is discarded when it is discarded, not while it may still come back."""
    run = start(best=1.0, budget="total")
    places: dict[str, list[tuple[int, int]]] = {}

    def told(weights: Weights, scale: float) -> float:
        arm = run.controller.phase + str(len([1 for d in run.decisions if d.discarded_steps]))
        places.setdefault(arm, []).append((weights.step, weights.step + run.controller.ahead))
        return weights.loss(scale)

    run.told = told
    run.train()
    races = [arm for arm in places if arm.startswith("trial")]
    assert len(races) > 1
    for arm in races:
        control = places["control" + arm.removeprefix("trial")]
        assert places[arm] == control[: len(places[arm])]
    whole = [place for arm, steps in places.items() if not arm.startswith(("trial", "restart")) for _, place in steps]
    assert whole == sorted(set(whole)) and whole[-1] == N - 1


@settings(max_examples=40, deadline=None)
@given(seed=strategies.integers(0, 10**6))
def test_any_losses_at_all_are_answered(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = [math.nan, math.inf, 1.7e308, -1.7e308, 1e30, -3.0, 0.0, 2.0, 2.1]
    run = start(1.0, told=lambda weights, scale: float(random.choice(values))).train()
    assert run.controller.phase == "done" and run.weights.step == N
    assert 1e-4 <= run.controller.scale <= 1e4


def test_the_memory_of_the_search_is_freed_at_its_end() -> None:
    state = start(best=9.0).train().controller.state_dict()
    assert (state["opening"], state["control"], state["trial"]) == ([], [], [])


def test_where_the_races_are() -> None:
    settings = AdaLRSSettings(mode="robust")
    assert settings.resolve(10_000, 500) == RacePlan(500, 150, 1000, 4000, 150, 150, 60, 120, 40, 10_000, 500)
    assert settings.resolve(400) == RacePlan(16, 16, 40, 160, 20, 20, 8, 24, 8, 400)
    text = str(settings.resolve(10_000))
    assert "climbs from step 150 on in races of 150 steps an arm, discarding at most 750 steps (7.5%)" in text
    assert "step 1000 to 4000" in text and "at most 3000 steps (30.0%)" in text
    assert "2380 more (23.8%) for a restart" in text and "1240 for each further one" in text


@pytest.mark.parametrize("best", [0.001, 0.02, 0.1, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("climb", [True, False])
def test_no_run_discards_more_than_is_told_before_it(best: float, climb: bool) -> None:
    run = start(best, climb=climb).train()
    told = str(run.controller.plan)
    most = sum(map(int, re.findall(r"(?:at most|too large) (\d+) (?:steps|more)", told)))
    further = int(re.findall(r"(\d+) for each further one", told)[0])
    new_runs = sum(decision.restore == "initial" for decision in run.decisions)
    assert 0 < run.executed - N <= most + max(0, new_runs - 2) * further


@pytest.mark.parametrize(
    ("values", "steps", "message"),
    [
        ({}, 100, "is step 10: a race needs 16 steps before it"),
        ({"trial_steps": 300, "return_steps": 301}, 2000, "600 steps cannot hold a race of .* 300 [+] 301 = 601"),
        ({"window": 20}, 2000, "adalrs.window=20 must be left out in robust mode"),
        ({"return_steps": 9}, 2000, "adalrs.return_steps=9 must be .* at least 10"),
        ({"max_discarded": -0.1}, 2000, "adalrs.max_discarded=-0.1"),
        ({"budget": "all"}, 2000, 'adalrs.budget=.all. must be "kept" or "total"'),
        ({"finest_factor": 1.0}, 2000, "adalrs.finest_factor=1.0 must be above 1"),
    ],
)
def test_a_search_that_cannot_be_is_refused(values: dict[str, Any], steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaLRSSettings(mode="robust", **values).resolve(steps)


def test_races_begin_after_the_warm_up() -> None:
    with pytest.raises(ValueError, match="inside the warm-up of 201 steps"):
        AdaLRSSettings(mode="robust").resolve(2000, 201)
