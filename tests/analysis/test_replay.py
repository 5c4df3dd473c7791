from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_adalrs.adalrs.controller import build_controller
from megatron_adalrs.adalrs.decision import Decision, Event, InMemoryRun, apply_decision
from megatron_adalrs.adalrs.settings import AdaLRSSettings
from megatron_adalrs.analysis.loss_curve import deviation
from megatron_adalrs.analysis.replay import Arms, Executed, differences, replay, unpaired_share
from megatron_adalrs.analysis.simulate import State, Surface

N = 800
PAPER, ROBUST = (AdaLRSSettings(mode=mode) for mode in ("paper", "robust"))
STEPS = np.arange(N)
RECORD = 2 + 3 / (1 + STEPS / 50) + 0.1 * np.random.default_rng(0).standard_normal(N)
"""A falling loss with noise."""


class Recorded:
    """Log of a run with a search on the simulated surface."""

    def __init__(
        self, settings: AdaLRSSettings, initial: float, interrupted_at: tuple[int, ...] = ()
    ) -> None:
        surface, random = Surface(), np.random.default_rng(1)
        of_batch = surface.noise * random.standard_normal(N)
        controller = build_controller(settings, N)
        self.executed: list[Executed] = []
        self.journal: list[Any] = []
        self.interruptions: set[int] = set()
        losses: dict[int, float] = {}
        run = InMemoryRun(State())

        def take(decision: Decision) -> None:
            apply_decision(decision, run)
            if decision.event is not None:
                self.journal.append(replace(decision, event=decision.event.value))  # type: ignore[arg-type]

        take(controller.resume())
        while run.state.step < N:
            state = run.state
            loss = surface.level(state.progress, state.heat, state.harm) + float(of_batch[state.step])
            loss += 0.02 * float(random.standard_normal())
            row = Executed(
                state.step + 1, controller.scale, loss, True, len(self.executed) + 1, controller.phase
            )
            run.state = surface.stepped(state, initial * controller.scale)
            self.executed.append(row)
            losses[row.step] = loss
            take(controller.observe(loss))
            if len(self.executed) in interrupted_at:
                self.interruptions.add(len(self.executed))
                take(controller.interrupt())
                take(controller.resume())
        self.losses = np.array([losses[step + 1] for step in range(N)])
        self.scale = controller.scale


@pytest.mark.parametrize("settings", [PAPER, ROBUST], ids=lambda settings: settings.mode)
@pytest.mark.parametrize("initial", [0.1, 8.0])
@pytest.mark.parametrize("interrupted_at", [(), (95, 130, 260)])
def test_replay_repeats_the_decisions_of_the_journal(
    settings: AdaLRSSettings, initial: float, interrupted_at: tuple[int, ...]
) -> None:
    run = Recorded(settings, initial, interrupted_at)
    again = replay(settings, N, run.losses, executed=run.executed, interruptions=run.interruptions)
    assert all(one.recorded for one in again.decisions)
    assert len(again.decisions) == len(run.journal)
    assert differences(again.decisions, run.journal) is None
    assert again.scale == run.scale and again.finished
    assert again.discarded == len(run.executed) - N


def test_replay_leaves_the_record_when_decisions_diffe() -> None:
    run = Recorded(ROBUST, 0.1)
    strict = replace(ROBUST, confidence=1e6)
    again = replay(strict, N, run.losses, executed=run.executed)
    known = [one.recorded for one in again.decisions]
    lost = [one.decision.event for one in again.decisions].index(Event.FAILED)
    assert all(known[: lost + 1]) and not any(known[lost + 1 :])
    assert "decision" in (differences(again.decisions, run.journal) or "")
    assert again.scale == 1.0


def test_verdicts_on_a_foreign_record_are_assumed() -> None:
    again = replay(PAPER, N, RECORD)
    first = again.decisions[0].decision
    assert first.event in (Event.WINDOW, Event.TRIAL_STARTED)
    start, k = again.plan.watch_start, again.plan.window
    assert first.velocity == pytest.approx(-np.polyfit(range(k), RECORD[start : start + k], 1)[0])
    verdicts = (Event.NEUTRAL, Event.FAILED, Event.ACCEPTED, Event.ABORTED)
    assert not any(one.recorded for one in again.of(*verdicts))
    neutral = [one.decision.event for one in again.decisions].index(Event.NEUTRAL)
    assert again.decisions[neutral - 1].recorded and again.decisions[neutral + 1].recorded


def test_decisions_after_an_accepted_trial_are_assumed() -> None:
    falls = 5 - 1e-3 * STEPS - 1e-6 * STEPS**2 + 1e-9 * STEPS**3  # faster and faster, then slower
    again = replay(replace(PAPER, decay_threshold=1.5), N, falls)
    first = again.of(Event.ACCEPTED)[0]
    after = again.decisions[again.decisions.index(first) :]
    assert not any(one.recorded for one in after)


def test_equal_arms_show_races_and_required_gains() -> None:
    again = replay(replace(ROBUST, climb=False), N, RECORD, unpaired=0.2)
    races = [one for one in again.of(Event.FAILED) if one.decision.threshold > 0]
    assert races and again.scale == 1.0 and again.finished
    for one in races:
        decision = one.decision
        assert decision.gain == pytest.approx(0.0, abs=1e-9)
        assert decision.threshold == pytest.approx(ROBUST.confidence * decision.gain_error)
        judged = again.plan.return_steps - again.plan.skipped_steps
        expected = 0.2 * math.sqrt(2) * 0.1 / math.sqrt(judged)
        assert decision.gain_error == pytest.approx(expected, rel=0.35)
        assert one.noise == pytest.approx(0.1, rel=0.3)


def test_gain_error_scales_with_the_noise() -> None:
    descent = 2 + 3 / (1 + STEPS / 50)
    loud = descent + 5 * (RECORD - descent)
    errors = [
        replay(replace(ROBUST, climb=False), N, losses, unpaired=unpaired)
        .of(Event.FAILED)[0]
        .decision.gain_error
        for losses, unpaired in ((RECORD, 0.1), (loud, 0.1), (RECORD, 0.5))
    ]
    assert errors[1] == pytest.approx(5 * errors[0], rel=0.15)
    assert errors[2] == pytest.approx(5 * errors[0], rel=1e-6)


def test_better_arms_raise_and_worse_arms_abort() -> None:
    better, equal, worse = (
        replay(ROBUST, N, RECORD, arms=arms) for arms in (Arms.BETTER, Arms.EQUAL, Arms.WORSE)
    )
    assert better.scale > 3 and len(better.of(Event.ACCEPTED)) > 2
    aborted = [one.decision for one in worse.of(Event.ABORTED)]
    assert aborted and all(decision.threshold < 0 for decision in aborted)
    assert worse.discarded < equal.discarded
    assert (equal.scale, worse.scale) == (1.0, 1.0)


@pytest.mark.parametrize("settings", [PAPER, ROBUST], ids=lambda settings: settings.mode)
def test_nan_and_infinite_losses_are_replayed(settings: AdaLRSSettings) -> None:
    holes = RECORD.copy()
    holes[100:140] = math.nan
    holes[300] = math.inf
    assert replay(settings, N, holes).finished
    nothing = replay(settings, N, np.full(N, math.nan))
    assert nothing.finished and not nothing.of(Event.ACCEPTED)


def test_short_record_is_replayed_to_its_end() -> None:
    whole, half = (replay(PAPER, N, RECORD[:n]) for n in (N, 200))
    assert whole.finished and not half.finished
    assert [one.decision for one in half.decisions] == [
        one.decision for one in whole.decisions[: len(half.decisions)]
    ]


def test_rising_loss_cuts_the_rate() -> None:
    again = replay(PAPER, N, 2 + 1e-3 * STEPS)
    cut = again.of(Event.SCALED_DOWN)
    assert cut and cut[0].decision.scale_after == 0.5


def test_unpaired_share_is_measured_on_races() -> None:
    run = Recorded(ROBUST, 0.1)
    noise = deviation(run.losses[100:])
    assert unpaired_share(run.executed) == pytest.approx(0.02 / noise, rel=0.5)
    assert math.isnan(unpaired_share(run.executed[:50]))


def test_replay_requires_an_enabled_search() -> None:
    with pytest.raises(ValueError, match=r"adalrs\.mode=off: there is no search to replay"):
        replay(AdaLRSSettings(), N, RECORD)
