from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adalrs.adalrs.settings import AdaLRSSettings
from megatron_adalrs.analysis.loss_curve import deviation, fit_descent
from megatron_adalrs.analysis.search_lengths import lengths_in_steps, with_lengths
from megatron_adalrs.analysis.simulate import Simulation, State, Surface, surface_like

N = 1000
PAPER, ROBUST = (AdaLRSSettings(mode=mode) for mode in ("paper", "robust"))


def cosine(steps: int) -> list[float]:
    warmup = 0.03 * steps
    return [
        min(1.0, (step + 1) / warmup)
        * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / steps)))
        for step in range(steps)
    ]


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    return Simulation(Surface(), cosine(N), 30)


@given(ratios=st.lists(st.floats(1e-3, 100.0), min_size=1, max_size=50))
@settings(max_examples=30)
def test_closed_form_equals_single_steps(ratios: list[float]) -> None:
    surface = Surface()
    state = State()
    for ratio in ratios:
        state = surface.stepped(state, ratio)
    at_once = surface.at_the_end(State(), np.array(ratios))
    assert surface.level(state.progress, state.heat, state.harm) == pytest.approx(at_once, rel=1e-12)


@given(at=st.floats(-5, 5), off=st.floats(0.01, 3))
def test_descent_is_fastest_at_the_best_rate(at: float, off: float) -> None:
    surface = Surface()
    lower, here, higher = (-math.log(surface.descent(math.exp(x))) for x in (at - off, at, at + off))
    assert lower + higher > 2 * here
    assert surface.descent(math.exp(at)) <= surface.descent(1.0) == 1.0


def test_lower_rate_helps_at_once_but_not_in_the_end() -> None:
    surface = Surface()
    start = State()
    for _ in range(200):
        start = surface.stepped(start, 1.0)
    after = {
        (ratio, n): surface.at_the_end(start, np.full(n, ratio)) for ratio in (1.0, 0.2) for n in (30, 3000)
    }
    assert after[0.2, 30] < after[1.0, 30] - 0.02
    level = replace(surface, heat=0.0)
    assert level.at_the_end(start, np.full(3000, 0.2)) > level.at_the_end(start, np.full(3000, 1.0))


def test_harm_of_a_high_rate_is_permanent() -> None:
    surface = Surface()
    healthy, harmed = np.ones(100), np.full(100, 3 * surface.critical)
    rest = np.ones(5000)
    ends = [surface.at_the_end(State(), np.concatenate([start, rest])) for start in (healthy, harmed)]
    assert ends[1] - ends[0] > 0.5 * surface.damage


def test_block_descends_like_its_steps(simulation: Simulation) -> None:
    whole = Simulation(Surface(), cosine(10 * N), 300)
    blocks = Simulation(Surface().in_blocks(10), cosine(10 * N)[::10], 30)
    for ratio in (0.1, 1.0):
        assert blocks.fixed(ratio) == pytest.approx(whole.fixed(ratio), abs=0.01)


def test_best_fixed_rate_has_the_lowest_loss(simulation: Simulation) -> None:
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert simulation.fixed(factor * simulation.best_ratio) > simulation.best_loss


@pytest.mark.parametrize("mode", [PAPER, ROBUST], ids=lambda mode: mode.mode)
def test_seed_determines_the_run(simulation: Simulation, mode: AdaLRSSettings) -> None:
    assert simulation.run(mode, 0.3, 5) == simulation.run(mode, 0.3, 5)
    loud = Simulation(Surface(noise=1.0), cosine(N), 30)
    assert len({loud.run(mode, 0.3, seed).excess for seed in range(6)}) > 1


def test_run_without_a_search_has_a_fixed_rate(simulation: Simulation) -> None:
    outcome = simulation.run(AdaLRSSettings(), 0.1, 0)
    assert (outcome.gained, outcome.discarded, outcome.found) == (0.0, 0.0, 0.1)


def test_races_at_the_best_rate_change_nothing(simulation: Simulation) -> None:
    outcomes = [simulation.run(ROBUST, 1.0, seed) for seed in range(4)]
    assert all(outcome.excess == pytest.approx(0.0, abs=1e-12) for outcome in outcomes)
    assert all(0 < outcome.discarded < 0.3 for outcome in outcomes)


def test_only_unpaired_noise_prevents_convergence(simulation: Simulation) -> None:
    outcomes = [simulation.run(ROBUST, 0.1, seed) for seed in range(6)]
    assert all(outcome.within_two and outcome.gained > 0.2 for outcome in outcomes)
    # Noise of the batch is equal in both arms and cancels.
    loud = Simulation(Surface(noise=2.0, unpaired=0.01), cosine(N), 30)
    assert all(loud.run(ROBUST, 0.1, seed).within_two for seed in range(3))
    alone = Simulation(Surface(noise=2.0, unpaired=1.0), cosine(N), 30)
    assert not all(alone.run(ROBUST, 0.1, seed).within_two for seed in range(3))


def test_total_budget_counts_discarded_steps(simulation: Simulation) -> None:
    kept, total = (simulation.run(replace(ROBUST, budget=budget), 0.1, 0) for budget in ("kept", "total"))
    assert total.discarded > 0 and total.excess > kept.excess


def test_fitted_surface_has_the_noise_of_the_record() -> None:
    true = Surface(floor=2.0, drop=3.0, pace=30.0, exponent=0.5, heat=0.3, noise=0.1)
    schedule = cosine(2000)
    state, record, random = State(), [], np.random.default_rng(3)
    for factor in schedule:
        record.append(
            true.level(state.progress, state.heat, state.harm) + true.noise * random.standard_normal()
        )
        state = true.stepped(state, factor)
    record[500:600] = [math.nan] * 100
    fitted = surface_like(record, schedule)
    assert fitted.noise == pytest.approx(true.noise, rel=0.1)
    for n in (300, 1000, 2000):
        ratios = np.array(schedule[:n])
        assert fitted.at_the_end(State(), ratios) == pytest.approx(true.at_the_end(State(), ratios), abs=0.03)


def test_unusable_record_is_rejected() -> None:
    rising = np.linspace(2.0, 3.0, 400)
    with pytest.raises(ValueError, match="the loss does not fall"):
        surface_like(rising, np.ones(400).tolist())
    with pytest.raises(ValueError, match="5 losses are too few"):
        fit_descent([5.0, 4.0, 3.0, 2.0, 1.0], range(5), np.ones(5))


def test_deviation_excludes_the_descent() -> None:
    steps = np.arange(4000)
    losses = 1e6 + 5 * np.exp(-steps / 1000) + 0.05 * np.random.default_rng(0).standard_normal(4000)
    losses[::7] = math.nan
    assert deviation(losses) == pytest.approx(0.05, rel=0.05)
    assert math.isnan(deviation([1.0, math.inf, 2.0]))


def test_lengths_can_be_scaled() -> None:
    for mode in (PAPER, ROBUST):
        plan = mode.resolve(4000)
        lengths = lengths_in_steps(mode, plan)
        assert lengths and all(length >= 24 for length in lengths.values())
        scaled = with_lengths(mode, plan, 0.5)
        assert lengths_in_steps(scaled, scaled.resolve(4000)) == {k: round(v / 2) for k, v in lengths.items()}
    with pytest.raises(ValueError, match=r"adalrs\.window=1 must be .* at least 3"):
        with_lengths(PAPER, PAPER.resolve(4000), 0.01)
