"""The MLP of a transformer block.

A mixture-of-experts layer would be a module of its own in this package with the same interface, [b, s, h] to
[b, s, h], which `gpt.Block` would build instead of `MLP`. The engine would need a process group for its
experts, and `GPT.forward` would add its load-balancing loss.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_adalrs.parallel.layout import ONE_PROCESS_LAYOUT, Layout


class MLP(nn.Module):
    """GELU (tanh approximation, as in GPT-2), or silu(gate) * up with `swiglu` (arXiv 2002.05202).

    With `swiglu`, one projection computes [gate | up]. Along a tensor axis each rank has a part of the width.
    """

    def __init__(self, config: ModelConfig, layout: Layout = ONE_PROCESS_LAYOUT) -> None:
        super().__init__()
        self.gated = config.swiglu
        hidden, width = config.hidden_size, config.mlp_size
        self.input = ColumnParallelLinear(hidden, (width,) * (1 + self.gated), config.add_bias_linear, layout)
        self.output = RowParallelLinear(width, hidden, config.add_bias_linear, layout)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [b, s, h] to the same shape."""
        x = self.input(x)  # [b, s, ffn or 2 ffn]
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            x = F.gelu(x, approximate="tanh")
        y: Tensor = self.output(x)
        return y
