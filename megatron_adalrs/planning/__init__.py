"""Estimates of a run's memory before it starts, without process group, ranks or weights.

Ranks that differ only in their data, context or tensor coordinate need the same memory, so there is one
estimate per pipeline stage.
"""

from __future__ import annotations

from megatron_adalrs.planning.dry_run import describe
from megatron_adalrs.planning.memory import RankPlan, RunPlan, plan_run

__all__ = ["RankPlan", "RunPlan", "describe", "plan_run"]
