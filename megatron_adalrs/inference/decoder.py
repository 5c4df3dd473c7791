"""Decoding token by token: the keys and values of what came before are kept, not computed again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_adalrs.model.attention import Attention
from megatron_adalrs.model.gpt import GPT, Block


class Decoder:
    """A model, and what it remembers of the sequences that it has been shown so far.

    Args:
        model: whole, in this process.
        batch: sequences, which grow together.
        capacity: most tokens of one.

    Raises:
        ValueError: the model has fewer positions than `capacity`.
    """

    def __init__(self, model: GPT, batch: int, capacity: int) -> None:
        if capacity > max_positions(model):
            raise ValueError(f"{capacity} tokens: the model has {max_positions(model)} positions")
        self.model, self.length = model, 0
        attention = model.blocks[0].attention
        shape = (len(model.blocks), batch, attention.groups, capacity, attention.head_dim)
        weight = attention.qkv.weight
        self._keys, self._values = (
            torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in range(2)
        )

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Show the next tokens [b, s], int64. Returns the logits of what follows the last one, [b,
        vocabulary]."""
        first, self.length = self.length, self.length + tokens.shape[1]
        positions = torch.arange(first, self.length, device=tokens.device)[None]
        x = self.model.embedding(tokens, positions)
        for number, block in enumerate(self.model.blocks):
            x = self._block(number, block, x, positions)
        x = self.model.final_norm(x[:, -1])
        return (x @ self.model.output_weight.t())[:, : self.model.vocab_size]

    def _block(self, number: int, block: Block, x: Tensor, positions: Tensor) -> Tensor:
        x = x + self._attend(number, block.attention, block.attention_norm(x), positions)
        return x + block.mlp(block.mlp_norm(x))

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
        # A query sees all that came before it, and itself.
        seen = torch.arange(self.length, device=x.device) <= positions[0, :, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return attention.output(y.transpose(1, 2).flatten(2))


def max_positions(model: GPT) -> int:
    """Tokens that a sequence may have."""
    if model.embedding.positions is not None:
        return model.embedding.positions.num_embeddings
    return model.rotary.cos.shape[0]
