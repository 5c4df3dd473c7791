"""Causal self-attention with all heads, or with those of a tensor rank.

Shapes: b = micro batch, s = sequence, h = hidden size, n = query heads, g = key-value heads, d = head size,
where n and g are those of one rank of the tensor axis. Key-value heads are not replicated: their number is
divisible by the size of the axis.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_adalrs.config import ModelConfig
from megatron_adalrs.model.document_mask import NO_ATTENTION_INPUTS, AttentionInputs
from megatron_adalrs.model.rotary_embedding import Rotary
from megatron_adalrs.parallel.activation_checkpointing import checkpoint_activations
from megatron_adalrs.parallel.context_parallel import heads_to_sequence, sequence_to_heads
from megatron_adalrs.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_adalrs.parallel.layout import ONE_PROCESS_LAYOUT, Layout
from megatron_adalrs.parallel.random import rank_local_rng


class Attention(nn.Module):
    """Causal self-attention with grouped queries; one projection computes [q heads | k heads | v heads]."""

    def __init__(self, config: ModelConfig, layout: Layout = ONE_PROCESS_LAYOUT) -> None:
        super().__init__()
        self.layout = layout
        self.head_dim = config.head_dim
        self.dropout = config.attention_dropout
        self.heads = config.num_attention_heads // layout.tensor.size
        self.groups = config.num_key_value_heads // layout.tensor.size
        q, kv = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.qkv = ColumnParallelLinear(config.hidden_size, (q, kv, kv), config.has_qkv_bias, layout)
        self.output = RowParallelLinear(q, config.hidden_size, config.add_bias_linear, layout)

    def forward(
        self, x: Tensor, rotary: Rotary | None, attention_inputs: AttentionInputs = NO_ATTENTION_INPUTS
    ) -> Tensor:
        """Map x [b, s, h] to the same shape."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [b, n + 2 g, s, d]
        q, k, v = heads.split([self.heads, self.groups, self.groups], dim=1)
        q, k, v = sequence_to_heads(q, k, v, self.layout.context)
        if self.layout.recompute == "selective":
            y = checkpoint_activations(self._core, q, k, v, rotary, attention_inputs)
        else:
            y = self._core(q, k, v, rotary, attention_inputs)
        y = heads_to_sequence(y, self.layout.context)
        output: Tensor = self.output(y.transpose(1, 2).flatten(2))  # [b, s, n d] -> [b, s, h]
        return output

    def _core(
        self, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None, attention_inputs: AttentionInputs
    ) -> Tensor:
        """Return attention [b, n, s, d] of q [b, n, s, d] and k, v [b, g, s, d], for whole sequences."""
        if rotary is not None:
            q, k = rotary(q, attention_inputs.positions), rotary(k, attention_inputs.positions)
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))  # [b, n, s, d]
        drop = self.dropout if self.training else 0.0
        with rank_local_rng(self.layout.tensor) if drop else nullcontext():
            mask = attention_inputs.mask
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=drop, is_causal=mask is None)
