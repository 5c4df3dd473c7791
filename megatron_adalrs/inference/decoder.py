"""Decode token by token with a cache of keys and values."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_adalrs.model.attention import Attention
from megatron_adalrs.model.gpt import GPT, Block


class Decoder:
    """A model with the cached keys and values of the sequences that it has processed.

    Args:
        model: A model without tensor or pipeline parallelism.
        batch: Number of sequences, which have equal lengths.
        capacity: Maximum number of tokens of a sequence.

    Raises:
        ValueError: The model has fewer positions than `capacity`.
    """

    def __init__(self, model: GPT, batch: int, capacity: int) -> None:
        if capacity > max_positions(model):
            raise ValueError(f"{capacity} tokens: the model has {max_positions(model)} positions")
        self.model = model
        self.length = 0
        """Number of tokens processed so far."""
        self._blocks = cast("list[Block]", list(model.blocks))
        attention = self._blocks[0].attention
        shape = (len(self._blocks), batch, attention.groups, capacity, attention.head_dim)
        weight = attention.qkv.weight
        self._keys, self._values = (
            torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in range(2)
        )

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Process the next tokens.

        Args:
            tokens: [b, s], int64.

        Returns:
            Logits of the token after the last one, [b, vocabulary].
        """
        first, self.length = self.length, self.length + tokens.shape[1]
        positions = torch.arange(first, self.length, device=tokens.device)[None]
        x: Tensor = self.model.embedding(tokens, positions)
        for number, block in enumerate(self._blocks):
            x = self._block(number, block, x, positions)
        x = self.model.final_norm(x[:, -1])
        return (x @ self.model.output_weight.t())[:, : self.model.vocab_size]

    def _block(self, number: int, block: Block, x: Tensor, positions: Tensor) -> Tensor:
        x = x + self._attend(number, block.attention, block.attention_norm(x), positions)
        y: Tensor = block.mlp(block.mlp_norm(x))
        return x + y

    def _attend(self, number: int, attention: Attention, x: Tensor, positions: Tensor) -> Tensor:
        heads = attention.qkv(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # [b, n + 2 g, s, d]
        q, k, v = heads.split([attention.heads, attention.groups, attention.groups], dim=1)
        if self.model.rotary is not None:
            q, k = (self.model.rotary(part, positions) for part in (q, k))
        self._keys[number, :, :, positions[0]] = k
        self._values[number, :, :, positions[0]] = v
        k, v = (kept[number, :, :, : self.length] for kept in (self._keys, self._values))
        if attention.groups != attention.heads:
            k, v = (t.repeat_interleave(attention.heads // attention.groups, dim=1) for t in (k, v))
        # A query attends to itself and to all earlier tokens.
        mask = torch.arange(self.length, device=x.device) <= positions[0, :, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        projected: Tensor = attention.output(y.transpose(1, 2).flatten(2))
        return projected


def max_positions(model: GPT) -> int:
    """Return the maximum length of a sequence."""
    if model.embedding.positions is not None:
        return model.embedding.positions.num_embeddings
    assert model.rotary is not None, "positions are either learned or rotary"
    return model.rotary.cos.shape[0]
