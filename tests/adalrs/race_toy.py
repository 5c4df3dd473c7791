"""Model of a training run for the tests of robust mode.

As in training, the loss depends on all earlier rates, the batch and the current rate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_adalrs.adalrs.controller import RobustController, build_controller
from megatron_adalrs.adalrs.decision import Decision, apply_decision
from megatron_adalrs.adalrs.settings import AdaLRSSettings

N = 1000
NOISE = np.random.default_rng(0).normal(0.0, 0.05, 4 * N)  # Noise of a batch, equal in both arms of a race.


@dataclass(frozen=True)
class Weights:
    """State of a simulated model."""

    step: int = 0
    level: float = 5.0
    damaged: bool = False
    path: tuple[float, ...] = ()
    """Scale of every earlier step."""

    def trained(self, scale: float, best: float) -> Weights:
        off = abs(math.log(scale / best))
        damaged = self.damaged or scale > 8 * best
        speed = 0.004 * max(0.1, 1 - (off / 3) ** 2) * (0.2 if damaged else 1.0)
        return Weights(self.step + 1, self.level * (1 - speed), damaged, (*self.path, scale))

    def loss(self, scale: float) -> float:
        # A high rate raises the loss as long as it is used.
        return self.level + 0.01 * math.log(scale) + NOISE[self.step]


@dataclass
class Run:
    """Trainer of the simulated model, which applies decisions like the real trainer."""

    controller: RobustController
    best: float
    loss_at: Callable[[Weights, float], float] = Weights.loss
    weights: Weights = field(default_factory=Weights)
    executed: int = 0
    decisions: list[Decision] = field(default_factory=list)
    snapshots: dict[str, Weights] = field(default_factory=dict)

    def train(self, until: Callable[[Run], bool] = lambda run: False) -> Run:
        self.apply_decision(self.controller.resume())
        while self.weights.step + self.controller.schedule_offset < N and not until(self):
            scale = self.controller.scale
            trained = self.weights.trained(scale, self.best)
            loss = self.loss_at(self.weights, scale)
            self.weights = trained
            self.executed += 1
            self.apply_decision(self.controller.observe(loss))
        return self

    def apply_decision(self, decision: Decision) -> None:
        if decision.event is None:
            return
        self.decisions.append(decision)
        apply_decision(decision, self)
        if not self.controller.needs_initial:
            self.snapshots.pop("initial", None)
        assert self.weights.step == self.controller.step == decision.step

    def capture(self, name: str) -> None:
        self.snapshots[name] = self.weights

    def restore(self, name: str) -> None:
        self.weights = self.snapshots[name]

    def restarted(self) -> Run:
        """Return the run in a new process, with the controller's saved state and without snapshots."""
        state = json.loads(json.dumps(self.controller.state_dict()))
        controller = RobustController(self.controller.settings, self.controller.plan)
        controller.load_state_dict(state)
        again = replace(self, controller=controller, snapshots={})
        if controller.needs_initial:
            again.snapshots["initial"] = Weights()
        return again

    def events(self) -> list[str]:
        return [decision.event.value for decision in self.decisions]


def start(best: float, loss_at: Callable[[Weights, float], float] = Weights.loss, **values: Any) -> Run:
    controller = build_controller(AdaLRSSettings(mode="robust", **values), N)
    assert isinstance(controller, RobustController)
    return Run(controller, best, loss_at)


def at_fixed_rate(best: float, scale: float = 1.0) -> Weights:
    weights = Weights()
    while weights.step < N:
        weights = weights.trained(scale, best)
    return weights


def far_below(weights: Weights, scale: float) -> float:
    """Return a loss whose rate of descent is proportional to the scale, up to a scale of 27."""
    return 5.0 - 0.02 * sum(min(1.0, each / 27.0) for each in weights.path) + 0.001 * NOISE[weights.step]
