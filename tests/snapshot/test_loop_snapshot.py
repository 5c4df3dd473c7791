from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from megatron_adalrs.snapshot.loop_snapshot import LoopSnapshot

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Alternating(torch.optim.Optimizer):
    """Optimizer with plain numbers and lists in its state, as in many third-party optimizers."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                state.setdefault("history", []).append(parameter.grad.norm().item())
                parameter -= group["lr"] * (-1) ** state["step"] * len(state["history"]) * parameter.grad


class Log:
    """Stateful object that keeps a reference to the state it loads."""

    def __init__(self) -> None:
        self.entries: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"entries": self.entries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.entries = state["entries"]


class Loop:
    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 1))
        self.optimizer = make_optimizer(self.model.parameters())
        self.log = Log()
        self.snapshot = LoopSnapshot(self.model, self.optimizer, [self.log])

    def train(self, steps: int = 4) -> list[float]:
        for _ in range(steps):
            loss = self.model(torch.randn(5, 3)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.log.entries.append(loss.item())
        return list(self.log.entries)


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        Alternating,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.Rprop,
        torch.optim.ASGD,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    ],
)
def test_restored_loop_repeats_the_same_steps(make_optimizer: MakeOptimizer, steps_before: int) -> None:
    loop = Loop(make_optimizer)
    loop.train(steps_before)
    loop.snapshot.capture()
    expected = loop.train()
    for _ in range(2):
        loop.snapshot.restore()
        assert loop.train() == expected


def test_changed_options_are_restored() -> None:
    rate = torch.tensor(0.1)
    loop = Loop(lambda parameters: torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95)))
    loop.snapshot.capture()
    loop.optimizer.param_groups[0]["lr"].mul_(3)
    loop.optimizer.param_groups[0]["betas"] = (0.5, 0.5)
    loop.snapshot.restore()
    assert loop.optimizer.param_groups[0]["lr"] is rate
    assert rate == torch.tensor(0.1)
    assert loop.optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_restore_requires_a_capture() -> None:
    loop = Loop(torch.optim.AdamW)
    with pytest.raises(RuntimeError, match="no captured state"):
        loop.snapshot.restore()
    loop.snapshot.capture()
    assert loop.snapshot.nbytes > 0
    loop.snapshot.clear()
    assert loop.snapshot.nbytes == 0
    with pytest.raises(RuntimeError, match="no captured state"):
        loop.snapshot.restore()
