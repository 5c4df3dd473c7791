"""AdaLRS: search the base learning rate inside one training run, with trials that can be undone.

This package does not need torch. `integrations.torch_loop.AdaLRS` attaches it to any torch optimizer and
training loop.
"""

from __future__ import annotations

from megatron_adalrs.adalrs.controller import (
    Controller,
    Decision,
    Event,
    FixedRate,
    PaperController,
    RobustController,
    build_controller,
)
from megatron_adalrs.adalrs.search_plan import RacePlan, SearchPlan
from megatron_adalrs.adalrs.settings import AdaLRSSettings
from megatron_adalrs.adalrs.slope import RunningSlope

__all__ = [
    "AdaLRSSettings",
    "Controller",
    "Decision",
    "Event",
    "FixedRate",
    "PaperController",
    "RacePlan",
    "RobustController",
    "RunningSlope",
    "SearchPlan",
    "build_controller",
]
