from __future__ import annotations

import json
import random

import numpy as np
import torch

from megatron_adalrs.snapshot.rng_state import RngState, seed_everything


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(),
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(1).item(),
    ]


def test_json_round_trip_resumes_every_generator() -> None:
    seed_everything(5, tensor_group=0)
    draws()
    saved = json.loads(json.dumps(RngState.capture().to_json()))
    expected = draws()
    assert draws() != expected
    RngState.from_json(saved).restore()
    assert draws() == expected


def test_tensor_groups_draw_different_numbers() -> None:
    seed_everything(5, tensor_group=0)
    first = draws()
    seed_everything(5, tensor_group=1)
    assert draws() != first
