"""Several documents in one sample: where attention, positions and loss begin anew.

As `get_ltor_masks_and_position_ids` of Megatron-LM (megatron/training/utils.py) has it: an end-of-document token
belongs to the document that it ends, and the token after it is the first of the next. With reset_attention_mask a token
attends to no token of an earlier document; with reset_position_ids its position counts from the beginning of its own;
with eod_mask_loss what is predicted from an end-of-document token, the first token of another document, does not count.

Shapes: b = micro batch, s = whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_adalrs.config import DataConfig

NOT_COUNTED = -1
"""Stands for a target that does not count."""


class Marks(NamedTuple):
    """What attention needs to know of a sample's documents; None: what it does without."""

    mask: Tensor | None = None
    """[b, 1, s, s], in the type of the activations: 0 where a token (row) sees another (column), minus infinity where
    not."""
    positions: Tensor | None = None
    """[b, s], int64: of each token in its document."""


UNMARKED = Marks()


@dataclass(frozen=True)
class Documents:
    """What an end-of-document token resets."""

    eod: int = NOT_COUNTED
    attention: bool = False
    positions: bool = False
    loss: bool = False

    @classmethod
    def of(cls, config: DataConfig) -> Documents:
        """What a configuration asks for, whose eod_token_id is known if it asks for any."""
        if not config.marks_documents:
            return ONE_DOCUMENT
        assert config.eod_token_id is not None
        return cls(config.eod_token_id, config.reset_attention_mask, config.reset_position_ids, config.eod_mask_loss)

    @property
    def marks_tokens(self) -> bool:
        """Whether blocks need to know of documents."""
        return self.attention or self.positions

    def numbers(self, tokens: Tensor) -> Tensor:
        """Of the document that each token is of, counting within the sample: int32, [b, s] of tokens [b, s]."""
        ends = (tokens == self.eod).int()
        return ends.cumsum(dim=1, dtype=torch.int32) - ends

    def marks(self, numbers: Tensor, dtype: torch.dtype) -> Marks:
        """What attention needs to know; `dtype`: of the activations."""
        mask = None
        if self.attention:
            is_hidden = numbers[:, :, None] != numbers[:, None, :]
            is_hidden |= torch.ones_like(is_hidden[0]).triu(1)
            mask = torch.zeros(is_hidden.shape, dtype=dtype, device=numbers.device)
            mask = mask.masked_fill_(is_hidden, -torch.inf).unsqueeze(1)
        return Marks(mask, self.positions_of(numbers))

    def positions_of(self, numbers: Tensor) -> Tensor | None:
        """Of each token in its document, [b, s], int64; None where positions are those in the sequence."""
        if not self.positions:
            return None
        places = torch.arange(numbers.shape[1], device=numbers.device).expand_as(numbers)
        begins = torch.diff(numbers, dim=1, prepend=numbers[:, :1] - 1) != 0
        return places - (places * begins).cummax(dim=1).values

    def targets(self, tokens: Tensor) -> Tensor:
        """[b, s] of tokens [b, s + 1]: what follows each token, NOT_COUNTED where that is not to be predicted."""
        following = tokens[:, 1:]
        return following.masked_fill(tokens[:, :-1] == self.eod, NOT_COUNTED) if self.loss else following


ONE_DOCUMENT = Documents()
"""A sample is one text, whatever tokens are in it."""
