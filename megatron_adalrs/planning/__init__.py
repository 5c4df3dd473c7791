"""What a run will hold where, worked out before anything is allocated: no process group, no ranks, no
weights.

parts.py        the parameters of each pipeline stage's ranks, counted on torch's meta device
activations.py  what the passes keep for each other, and their temporaries
memory.py       bytes of a rank, phase by phase of a step, as DeepSpeed allocates them
table.py        the plan as a person reads it

Ranks that differ only in their data, context or tensor coordinate hold equally large parts: one kind a stage.
"""

from __future__ import annotations

from megatron_adalrs.planning.memory import RankPlan, RunPlan, plan_run
from megatron_adalrs.planning.table import describe

__all__ = ["RankPlan", "RunPlan", "describe", "plan_run"]
