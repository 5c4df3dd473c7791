"""Several documents in one sample: where attention, positions and loss begin anew.

As `get_ltor_masks_and_position_ids` of Megatron-LM (megatron/training/utils.py) has it: an end-of-document
token belongs to the document that it ends, and the token after it is the first of the next. With
reset_attention_mask a token attends to no token of an earlier document; with reset_position_ids its position
counts from the beginning of its own; with eod_mask_loss what is predicted from an end-of-document token, the
first token of another document, does not count.

Shapes: b = micro batch, s = whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_adalrs.config import DataConfig

IGNORE_INDEX = -100
"""Stands for a target that does not count."""


class AttentionInputs(NamedTuple):
    """What attention needs to know of a sample's documents; None: what it does without."""

    mask: Tensor | None = None
    """[b, 1, s, s], in the type of the activations: 0 where a token (row) sees another (column), minus
    infinity where not."""
    positions: Tensor | None = None
    """[b, s], int64: of each token in its document."""


NO_ATTENTION_INPUTS = AttentionInputs()


@dataclass(frozen=True)
class DocumentMasking:
    """What an end-of-document token resets."""

    eod: int = IGNORE_INDEX
    attention: bool = False
    positions: bool = False
    loss: bool = False

    @classmethod
    def of(cls, config: DataConfig) -> DocumentMasking:
        """What a configuration asks for, whose eod_token_id is known if it asks for any."""
        if not config.marks_documents:
            return NO_DOCUMENT_MASKING
        assert config.eod_token_id is not None
        return cls(
            config.eod_token_id, config.reset_attention_mask, config.reset_position_ids, config.eod_mask_loss
        )

    @property
    def marks_tokens(self) -> bool:
        """Whether blocks need to know of documents."""
        return self.attention or self.positions

    def document_ids(self, tokens: Tensor) -> Tensor:
        """Of the document that each token is of, counting within the sample: int32, [b, s] of tokens [b,
        s]."""
        ends = (tokens == self.eod).int()
        return ends.cumsum(dim=1, dtype=torch.int32) - ends

    def marks(self, document_ids: Tensor, dtype: torch.dtype) -> AttentionInputs:
        """What attention needs to know; `dtype`: of the activations."""
        mask = None
        if self.attention:
            is_hidden = document_ids[:, :, None] != document_ids[:, None, :]
            is_hidden |= torch.ones_like(is_hidden[0]).triu(1)
            mask = torch.zeros(is_hidden.shape, dtype=dtype, device=document_ids.device)
            mask = mask.masked_fill_(is_hidden, -torch.inf).unsqueeze(1)
        return AttentionInputs(mask, self.positions_of(document_ids))

    def positions_of(self, document_ids: Tensor) -> Tensor | None:
        """Of each token in its document, [b, s], int64; None where positions are those in the sequence."""
        if not self.positions:
            return None
        places = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
        begins = torch.diff(document_ids, dim=1, prepend=document_ids[:, :1] - 1) != 0
        return places - (places * begins).cummax(dim=1).values

    def targets(self, tokens: Tensor) -> Tensor:
        """[b, s] of tokens [b, s + 1]: what follows each token, IGNORE_INDEX where that is not to be
        predicted."""
        following = tokens[:, 1:]
        return following.masked_fill(tokens[:, :-1] == self.eod, IGNORE_INDEX) if self.loss else following


NO_DOCUMENT_MASKING = DocumentMasking()
"""A sample is one text, whatever tokens are in it."""
