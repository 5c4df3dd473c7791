from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from megatron_adalrs.adalrs import AdaLRSSettings, Decision, Event
from megatron_adalrs.integrations.torch_loop import AdaLRS, scale_learning_rates

TRAIN_ITERS, WINDOW, TRIAL_START = 100, 5, 20
LossCurve = Callable[[int, str], float]
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=0.01),
}
SCHEDULERS = {
    "none": lambda optimizer: None,
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.05 * step)),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, TRAIN_ITERS, eta_min=1e-4),
    "sequential": lambda optimizer: warm_up_then(optimizer, 7),
    "onecycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=TRAIN_ITERS + 10),
}
MORE_SCHEDULERS = {
    "late sequential": lambda optimizer: warm_up_then(optimizer, 40),
    "chained": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(optimizer, 0.1), lr_scheduler.ExponentialLR(optimizer, 0.97)]
    ),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 12, eta_min=1e-4),
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 9),
    "polynomial": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 50),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-1, 8, cycle_momentum=False),
}


def warm_up_then(optimizer: Optimizer, warmup: int) -> lr_scheduler.LRScheduler:
    stages = [
        lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warmup),
        lr_scheduler.CosineAnnealingLR(optimizer, TRAIN_ITERS - warmup),
    ]
    return lr_scheduler.SequentialLR(optimizer, stages, [warmup])


class Data:
    """Data loader that continues at its position and draws a seed per iterator, like those of torchdata."""

    def __init__(self, batches_per_epoch: int) -> None:
        self.batches_per_epoch = batches_per_epoch
        self.position = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        torch.empty((), dtype=torch.int64).random_()
        return self.rest_of_epoch()

    def rest_of_epoch(self) -> Iterator[torch.Tensor]:
        while self.position < self.batches_per_epoch:
            self.position += 1
            generator = torch.Generator().manual_seed(self.position)
            yield torch.randn(4, 8, generator=generator)
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


@dataclass
class Loop:
    """Training loop of a small model that uses every random number generator.

    The model is trained on its own loss, but AdaLRS receives the artificial curve `loss_at`, with which each
    test produces the verdict that it checks.
    """

    optimizer_name: str = "adamw"
    scheduler_name: str = "none"
    settings: AdaLRSSettings = field(
        default_factory=lambda: AdaLRSSettings(
            mode="paper", window=WINDOW, search_start=0.2, search_end=0.6, on_fail="stay"
        )
    )
    batches_per_epoch: int = 7

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 1))
        self.temperature = nn.Parameter(torch.ones(()))
        self.optimizer = OPTIMIZERS[self.optimizer_name]([*self.model.parameters(), self.temperature])
        self.scheduler = (SCHEDULERS | MORE_SCHEDULERS)[self.scheduler_name](self.optimizer)
        self.data = Data(self.batches_per_epoch)
        self.adalrs = AdaLRS(
            self.model,
            self.optimizer,
            train_iters=TRAIN_ITERS,
            scheduler=self.scheduler,
            data=self.data,
            settings=self.settings,
        )
        self.batches = self.adalrs.batches()
        self.real_losses: dict[int, float] = {}
        self.decisions: list[Decision] = []

    def train(self, loss_at: LossCurve, until: Callable[[], bool]) -> None:
        while not self.adalrs.finished and not until():
            batch = next(self.batches)
            noise = random.random() + np.random.rand()
            loss = (self.model(batch) * self.temperature - batch.sum(1, keepdim=True) - noise).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.scheduler:
                self.scheduler.step()
            step = self.adalrs.steps
            self.real_losses[step] = loss.item()
            decision = self.adalrs.step(loss_at(step, self.adalrs.phase))
            if decision.event:
                self.decisions.append(decision)

    def train_to(self, step: int, loss_at: LossCurve | None = None) -> None:
        self.train(loss_at or slowing, lambda: self.adalrs.steps >= step)

    @property
    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def everything(self) -> tuple[Any, ...]:
        tensors = [*self.model.state_dict().values(), self.temperature, torch.get_rng_state()]
        for entries in self.optimizer.state.values():
            tensors += [torch.as_tensor(value) for value in entries.values() if value is not None]
        return (
            [tensor.detach().clone() for tensor in tensors],
            random.getstate(),
            self.rates,
            self.data.position,
        )


def slowing(step: int, phase: str) -> float:
    """Return a loss that slows down once, in the window before step 20, and does not fall in a trial."""
    if phase == "trial":
        return 50.0
    return 100.0 - step if step < 15 else 85.0 - 0.5 * (step - 14)


def steady(step: int, phase: str) -> float:
    """Return a loss that never slows down, so that no trial starts."""
    return 100.0 - step


def diverging(step: int, phase: str) -> float:
    return math.nan if phase == "trial" else slowing(step, phase)


def improving(step: int, phase: str) -> float:
    return 80.0 - 2.0 * (step - TRIAL_START) if phase == "trial" else slowing(step, phase)


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    (tensors, *rest), (other_tensors, *other_rest) = one, other
    assert rest == other_rest
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert len(tensors) == len(other_tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, other_tensors, strict=True))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss_at", [slowing, diverging])
def test_undone_trial_leaves_no_trace_in_the_run(optimizer: str, scheduler: str, loss_at: LossCurve) -> None:
    tried = Loop(optimizer, scheduler)
    tried.train(loss_at, lambda: any(decision.restore for decision in tried.decisions))
    assert tried.adalrs.steps == TRIAL_START
    assert tried.adalrs.discarded_steps == tried.decisions[-1].discarded_steps > 0
    undone = tried.everything()
    tried.train_to(TRIAL_START + 10, steady)
    later = tried.everything()
    calm = Loop(optimizer, scheduler)
    calm.train_to(TRIAL_START, steady)
    assert_same(undone, calm.everything())
    calm.train_to(TRIAL_START + 10, steady)
    assert_same(later, calm.everything())
    assert [tried.real_losses[step] for step in range(30)] == [calm.real_losses[step] for step in range(30)]


@pytest.mark.parametrize("batches_per_epoch", [1, TRIAL_START, 2 * TRAIN_ITERS])
def test_trial_can_start_anywhere_in_an_epoch(batches_per_epoch: int) -> None:
    tried = Loop(batches_per_epoch=batches_per_epoch)
    tried.train(slowing, lambda: any(decision.restore for decision in tried.decisions))
    tried.train_to(TRIAL_START + 10, steady)
    later = tried.everything()
    calm = Loop(batches_per_epoch=batches_per_epoch)
    calm.train_to(TRIAL_START + 10, steady)
    assert_same(later, calm.everything())


@pytest.mark.parametrize("name", SCHEDULERS | MORE_SCHEDULERS)
@pytest.mark.parametrize("scaled_at", [3, 20])
@pytest.mark.parametrize("tensor_rate", [False, True])
def test_every_scheduler_keeps_the_scaled_rate(name: str, scaled_at: int, tensor_rate: bool) -> None:
    def rates(ratio: float) -> NDArray[np.float64]:
        parameter = nn.Parameter(torch.zeros(()))
        other = nn.Parameter(torch.zeros(()))
        make_rate = (lambda rate: torch.tensor(rate, dtype=torch.float64)) if tensor_rate else float
        groups = [{"params": [parameter]}, {"params": [other], "lr": make_rate(0.02)}]
        optimizer = torch.optim.SGD(groups, lr=make_rate(0.05), momentum=0.9)
        scheduler = (SCHEDULERS | MORE_SCHEDULERS)[name](optimizer)
        seen = []
        for step in range(TRAIN_ITERS):
            optimizer.step()
            if scheduler:
                scheduler.step()
            if step == scaled_at:
                scale_learning_rates(optimizer, scheduler, ratio)
            seen.append([float(group["lr"]) for group in optimizer.param_groups])
            if scheduler:
                assert [float(rate) for rate in scheduler.get_last_lr()] == seen[-1]
        return np.array(seen)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, scaled = rates(1.0), rates(3.0)
    expected = np.where(np.arange(TRAIN_ITERS)[:, None] < scaled_at, plain, 3 * plain)
    np.testing.assert_allclose(scaled, expected, rtol=1e-9, atol=1e-15)


def test_rate_shared_by_groups_is_scaled_once() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(()))]}, {"params": [nn.Parameter(torch.zeros(()))]}]
    optimizer = torch.optim.AdamW(groups, lr=torch.tensor(1e-3, dtype=torch.float64))
    assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]
    scale_learning_rates(optimizer, None, 3.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([3e-3, 3e-3])


def test_final_rate_of_weight_averaging_is_scaled() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.1)
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=4)
    scale_learning_rates(optimizer, scheduler, 3.0)
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.15)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_accepted_trial_keeps_its_steps_and_rate(scheduler: str) -> None:
    loop = Loop(scheduler_name=scheduler)
    loop.train(improving, lambda: any(decision.event is Event.ACCEPTED for decision in loop.decisions))
    assert (loop.adalrs.steps, loop.adalrs.scale, loop.adalrs.discarded_steps) == (25, 3.0, 0)
    calm = Loop(scheduler_name=scheduler)
    calm.train_to(25, steady)
    assert loop.rates == pytest.approx([3 * rate for rate in calm.rates], rel=1e-9)
    loop.train_to(60, steady)
    calm.train_to(60, steady)
    assert loop.rates == pytest.approx([3 * rate for rate in calm.rates], rel=1e-9)


def test_failed_trial_halves_the_rate() -> None:
    settings = AdaLRSSettings(mode="paper", window=WINDOW, search_start=0.2, search_end=0.6)
    loop = Loop(scheduler_name="lambda", settings=settings)
    loop.train(diverging, lambda: any(decision.event is Event.ABORTED for decision in loop.decisions))
    calm = Loop(scheduler_name="lambda")
    calm.train_to(TRIAL_START, steady)
    assert loop.rates == [0.5 * rate for rate in calm.rates]


def test_run_ends_after_train_iters_kept_steps() -> None:
    loop = Loop()
    loop.train(slowing, lambda: False)
    assert loop.adalrs.finished
    assert loop.adalrs.steps == TRAIN_ITERS
    assert loop.adalrs.discarded_steps == sum(decision.discarded_steps for decision in loop.decisions) > 0
    assert loop.adalrs.phase == "done"
    assert next(loop.batches, None) is None


def move_to_a_new_process(loop: Loop) -> Loop:
    """Save the loop as a user would, and load it into newly built objects."""
    saved = {
        "model": loop.model.state_dict(),
        "optimizer": loop.optimizer.state_dict(),
        "scheduler": loop.scheduler.state_dict(),
        "data": loop.data.state_dict(),
        "adalrs": json.loads(json.dumps(loop.adalrs.state_dict())),
    }
    streams = random.getstate(), np.random.get_state(), torch.get_rng_state()
    fresh = Loop(loop.optimizer_name, loop.scheduler_name)
    fresh.model.load_state_dict(saved["model"])
    fresh.temperature.data.copy_(loop.temperature)
    fresh.optimizer.load_state_dict(saved["optimizer"])
    fresh.scheduler.load_state_dict(saved["scheduler"])
    fresh.data.load_state_dict(saved["data"])
    random.setstate(streams[0])
    np.random.set_state(streams[1])
    torch.set_rng_state(streams[2])
    fresh.adalrs.load_state_dict(saved["adalrs"])
    return fresh


@pytest.mark.parametrize("loss_at", [slowing, improving])
@pytest.mark.parametrize("new_process", [False, True])
def test_run_interrupted_in_a_trial_is_equal(loss_at: LossCurve, new_process: bool) -> None:
    straight = Loop(scheduler_name="cosine")
    straight.train_to(60, loss_at)
    expected = straight.everything()
    broken = Loop(scheduler_name="cosine")
    broken.train(loss_at, lambda: broken.adalrs.phase == "trial" and broken.adalrs.steps == 23)
    with pytest.raises(RuntimeError, match=r"call interrupt\(\) before saving"):
        broken.adalrs.state_dict()
    assert broken.adalrs.interrupt().discarded_steps == 3
    with pytest.raises(RuntimeError, match=r"call resume\(\)"):
        broken.adalrs.step(1.0)
    if new_process:
        broken = move_to_a_new_process(broken)
    else:
        broken.adalrs.resume()
    broken.train_to(60, loss_at)
    assert_same(broken.everything(), expected)
    assert broken.adalrs.scale == straight.adalrs.scale
    assert broken.adalrs.discarded_steps == straight.adalrs.discarded_steps + 3


def test_interruption_restores_the_rate() -> None:
    loop = Loop()
    before = loop.rates
    loop.train(slowing, lambda: loop.adalrs.phase == "trial" and loop.adalrs.steps == 23)
    during = loop.rates
    assert during == pytest.approx([3 * rate for rate in before])
    loop.adalrs.interrupt()
    assert loop.rates == before
    loop.adalrs.resume()
    assert loop.rates == during


def test_trial_is_saved_without_backtracking() -> None:
    settings = AdaLRSSettings(mode="paper", window=WINDOW, search_start=0.2, search_end=0.6, backtrack=False)
    loop = Loop(settings=settings)
    loop.train(slowing, lambda: loop.adalrs.phase == "trial")
    assert loop.adalrs.interrupt().event is None
    fresh = Loop(settings=settings)
    fresh.adalrs.load_state_dict(json.loads(json.dumps(loop.adalrs.state_dict())))
    assert (fresh.adalrs.phase, fresh.adalrs.scale) == ("trial", 3.0)


def test_loading_an_earlier_state_ends_an_interruption() -> None:
    loop = Loop()
    loop.train_to(10, steady)
    earlier = loop.adalrs.state_dict()
    loop.train(slowing, lambda: loop.adalrs.phase == "trial")
    loop.adalrs.interrupt()
    loop.adalrs.load_state_dict(earlier)
    loop.train_to(15, steady)
    assert loop.adalrs.steps == 15


def test_run_saved_outside_a_trial_is_equal() -> None:
    straight = Loop(scheduler_name="sequential")
    straight.train_to(60, improving)
    expected = straight.everything()
    broken = Loop(scheduler_name="sequential")
    broken.train_to(27, improving)
    assert broken.adalrs.interrupt().event is None
    broken = move_to_a_new_process(broken)
    broken.train_to(60, improving)
    assert_same(broken.everything(), expected)


def test_search_raises_a_far_too_low_rate() -> None:
    def train(enabled: bool) -> tuple[float, float]:
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        adalrs = AdaLRS(
            model, optimizer, train_iters=800, settings=AdaLRSSettings(mode="paper" if enabled else "off")
        )
        while not adalrs.finished:
            x = torch.randn(64, 2)
            loss = (model(x) - x.sum(1, keepdim=True) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            adalrs.step(loss)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * adalrs.scale)
        return adalrs.scale, loss.item()

    (_, fixed_loss), (scale, loss) = train(enabled=False), train(enabled=True)
    assert scale > 2
    assert loss < fixed_loss / 10


def test_disabled_search_does_not_change_the_loop() -> None:
    loop = Loop(settings=AdaLRSSettings())
    loop.train_to(40, slowing)
    trained = loop.everything()
    calm = Loop()
    calm.train_to(40, steady)
    assert_same(trained, calm.everything())
    assert loop.adalrs.phase == "fixed"


def test_buffer_registered_in_a_trial_is_kept() -> None:
    loop = Loop()
    loop.train(slowing, lambda: loop.adalrs.phase == "trial")
    loop.model.register_buffer("cache", torch.ones(3), persistent=False)
    loop.train(slowing, lambda: loop.adalrs.phase != "trial")
    assert torch.equal(loop.model.cache, torch.ones(3))


def test_expanded_buffer_is_restored() -> None:
    loop = Loop()
    loop.model.register_buffer("positions", torch.arange(4.0).expand(3, 2, -1))
    loop.train(slowing, lambda: loop.adalrs.phase == "trial")
    loop.model.positions[0, 0] += 1
    loop.train(slowing, lambda: loop.adalrs.phase != "trial")
    assert torch.equal(loop.model.positions, torch.arange(4.0).expand(3, 2, -1))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            {"data": torch.utils.data.DataLoader([1, 2])},
            r"data: DataLoader has no state_dict.*StatefulDataLoader",
        ),
        ({"scheduler": object()}, "scheduler: object has no state_dict"),
        ({"parts": [Data(1), "scaler"]}, r"parts\[1\]: str has no state_dict"),
    ],
)
def test_parts_without_a_state_are_rejected(argument: dict[str, Any], message: str) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=message):
        AdaLRS(model, torch.optim.SGD(model.parameters(), lr=0.1), 1000, **argument)


def test_batches_requires_iterable_data() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="argument data"):
        next(AdaLRS(model, optimizer, 1000).batches())
    with pytest.raises(ValueError, match="no batches"):
        next(AdaLRS(model, optimizer, 1000, data=nn.ModuleList()).batches())


def test_search_that_does_not_fit_is_rejected() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"adalrs\.search_start"):
        AdaLRS(model, torch.optim.SGD(model.parameters(), lr=0.1), train_iters=50)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "robust"}, "adalrs.mode='robust' needs a loop that can repeat the same batches"),
        ({"budget": "total"}, "adalrs.budget='total' needs a schedule that counts discarded steps"),
    ],
)
def test_modes_unsupported_by_a_loop_are_rejected(values: dict[str, Any], message: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=message):
        AdaLRS(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            2000,
            settings=AdaLRSSettings(**{"mode": "paper"} | values),
        )
