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


def test_every_stream_goes_on_from_where_it_was_saved_through_json() -> None:
    seed_everything(5, tensor_group=0)
    draws()
    saved = json.loads(json.dumps(RngState.capture().to_json()))
    expected = draws()
    assert draws() != expected
    RngState.from_json(saved).restore()
    assert draws() == expected


def test_tensor_groups_have_streams_of_their_own() -> None:
    seed_everything(5, tensor_group=0)
    first = draws()
    seed_everything(5, tensor_group=1)
    assert draws() != first
