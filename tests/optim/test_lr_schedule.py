"""Values of the schedules at given steps."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_adalrs.cli.arguments import config_from_values
from megatron_adalrs.optim.lr_schedule import Schedule, build_schedule, decay_factor


def schedule(**values: Any) -> Schedule:
    base = {"preset": "gpt2-tiny", "seq_length": 8, "data_path": "d", "train_iters": 100, "lr": 1.0}
    return build_schedule(config_from_values(base | values))


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD"])
def test_warm_up_is_linear_and_reaches_the_peak(style: str) -> None:
    factor = schedule(lr_decay_style=style, lr_warmup_iters=10)
    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(10) == pytest.approx(1.0)


def test_constant() -> None:
    assert schedule(lr_decay_style="constant")(99) == 1.0


def test_linear_and_cosine_end_at_the_floor() -> None:
    linear = schedule(lr_decay_style="linear", min_lr=0.1, lr_warmup_iters=20)
    assert [linear(20), linear(60), linear(100)] == pytest.approx([1.0, 0.55, 0.1])
    cosine = schedule(lr_decay_style="cosine", min_lr=0.2)
    assert [cosine(0), cosine(50), cosine(100), cosine(150)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert cosine(25) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_decay_can_end_before_training_does() -> None:
    factor = schedule(lr_decay_style="linear", lr_decay_iters=50)
    assert [factor(25), factor(50), factor(99)] == pytest.approx([0.5, 0.0, 0.0])


def test_inverse_square_root() -> None:
    factor = schedule(lr_decay_style="inverse-square-root", lr_warmup_iters=4, min_lr=0.25)
    assert [factor(4), factor(16), factor(99)] == pytest.approx([1.0, 0.5, 0.25])


@pytest.mark.parametrize(
    ("shape", "half_way"),
    [
        ("linear", 0.55),
        ("cosine", 0.55),
        ("exponential", 0.1 + 0.9 * (2 * 0.5**0.5 - 1)),
        ("minus_sqrt", 0.1 + 0.9 * (1 - 0.5**0.5)),
    ],
)
def test_wsd_is_stable_then_decays(shape: str, half_way: float) -> None:
    factor = schedule(
        lr_decay_style="WSD", lr_warmup_iters=10, lr_wsd_decay_style=shape, lr_wsd_decay_iters=20, min_lr=0.1
    )
    assert [factor(10), factor(50), factor(80)] == pytest.approx([1.0, 1.0, 1.0])
    assert [factor(90), factor(100)] == pytest.approx([half_way, 0.1])


def test_wsd_decays_over_a_tenth_by_default() -> None:
    factor = schedule(lr_decay_style="WSD", lr_wsd_decay_style="linear")
    assert [factor(90), factor(95)] == pytest.approx([1.0, 0.5])


def megatron_factor(
    step: int, style: str, warmup: int, end: int, floor: float, last: int, shape: str
) -> float:
    """Return get_lr of Megatron-LM's core/optimizer_param_scheduler.py for max_lr 1 after the warm-up."""
    if style == "constant":
        return 1.0
    if step > end:
        return floor
    if style == "inverse-square-root":
        return max(floor, max(warmup, 1) ** 0.5 / max(step, 1) ** 0.5)
    progress = (step - warmup) / (end - warmup)
    if style == "WSD":
        style, progress = shape, max(0.0, (step - (end - last)) / last)
    remaining = {
        "linear": 1.0 - progress,
        "cosine": 0.5 * (math.cos(math.pi * progress) + 1.0),
        "exponential": 2.0 * math.pow(0.5, progress) - 1.0,
        "minus_sqrt": 1.0 - math.sqrt(progress),
    }
    return floor + (1.0 - floor) * remaining[style]


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential", "minus_sqrt"])
@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD"])
def test_same_values_as_megatron_at_every_step(style: str, shape: str, warmup: int) -> None:
    factor = schedule(
        lr_decay_style=style,
        lr_wsd_decay_style=shape,
        lr_warmup_iters=warmup,
        lr_decay_iters=60,
        lr_wsd_decay_iters=12,
        min_lr=0.01,
    )
    expected = [megatron_factor(step, style, warmup, 60, 0.01, 12, shape) for step in range(warmup, 100)]
    assert [factor(step) for step in range(warmup, 100)] == pytest.approx(expected)


def test_after_the_decay_the_rate_is_min_lr() -> None:
    factor = schedule(lr_decay_style="inverse-square-root", lr_warmup_iters=4, lr_decay_iters=16, min_lr=0.25)
    assert [factor(15), factor(16)] == pytest.approx([(4 / 15) ** 0.5, 0.5])
    assert [factor(17), factor(99)] == [0.25, 0.25]
    assert schedule(lr_decay_style="constant", lr_decay_iters=50, min_lr=0.25)(99) == 1.0


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="'step'"):
        decay_factor("step", 0.5, 0.0)
