"""Recomputation of weights from the optimizer's fp32 masters, as in DeepSpeed's own update.

If DeepSpeed's optimizer has masters, the weights of the model are at all times these masters, rounded to the
model's precision. So a snapshot needs the masters only. Sources: `step` and `update_lp_params` of each
optimizer class (DeepSpeed 0.19.8).
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn


@torch.no_grad()
def weights_from_masters(optimizer: Any, module: nn.Module) -> None:
    """Write the weights from their masters, after those were written to. Collective with ZeRO.

    Without masters the optimizer is torch's, works on the weights themselves, and nothing is done.

    Args:
        optimizer: DeepSpeed's optimizer.
        module: the model.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        # ZeRO-3 keeps small weights whole on every rank. They are gathered from the shards again.
        resident: list[Any] = [p for p in module.parameters() if p.numel()]
        if resident:
            resident[0].partition(param_list=resident)
            resident[0].all_gather(param_list=resident)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            torch._foreach_copy_([weight.data for weight in weights], [master.data for master in masters])
    elif isinstance(optimizer, (BF16_Optimizer, DeepSpeedZeroOptimizer)):
        optimizer.update_lp_params()
