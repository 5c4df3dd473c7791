"""Scales, best rates and results for tests of the tables."""

from __future__ import annotations

from typing import Any

from megatron_adalrs.reproduction.plan import MAIN, SCALES, Run
from megatron_adalrs.reproduction.results import Result

TINY, SMOKE = SCALES["tiny"], SCALES["smoke"]
BEST = {("code", "cosine"): 3e-3, ("code", "WSD"): 5e-3, ("prose", "cosine"): 3e-3, ("wide", "cosine"): 3e-3}
BEST |= {("continual", "cosine"): 1e-3}


def result(method: str, lr: float, seed: int, valid: float, **changes: Any) -> Result:
    """Return a result; `changes` are fields, or the settings of the run."""
    run = Run(MAIN.name, "cosine", method, lr, seed, changes.pop("settings", ()))
    values: dict[str, Any] = {
        "name": f"{method}-{lr:g}-{seed}",
        "command": "megatron-adalrs pretrain",
        "train_iters": 1000,
        "scale": 1.0,
        "discarded_steps": 0,
        "snapshot_seconds": 0.0,
        "wall_seconds": 10.0,
        "curve": ((1000, valid),),
        "velocity": 1e-3,
        "velocity_error": 1e-5,
        "window_loss": 3.0,
        "step_seconds": 0.01,
    }
    return Result(run=run, valid=valid, **values | changes)
