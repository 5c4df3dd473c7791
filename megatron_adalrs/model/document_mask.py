"""Document masks: several documents in one sample, separated for attention, positions and loss.

As in `get_ltor_masks_and_position_ids` of Megatron-LM (megatron/training/utils.py), an end-of-document token
belongs to the document that it ends. With `reset_attention_mask` a token attends to no earlier document. With
`reset_position_ids` positions count from the start of each document. With `eod_mask_loss` the prediction
after an end-of-document token, which is the first token of another document, does not count.

Shapes: b = micro batch, s = whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_adalrs.config import DataConfig

IGNORE_INDEX = -100
"""A target that does not count."""


class AttentionInputs(NamedTuple):
    """Inputs of attention that depend on the documents in a sample; None for a single document."""

    mask: Tensor | None = None
    """[b, 1, s, s], dtype of the activations: 0 if a token (row) attends to a token (column), else -inf."""
    positions: Tensor | None = None
    """[b, s], int64: the position of each token in its document."""


NO_ATTENTION_INPUTS = AttentionInputs()


@dataclass(frozen=True)
class DocumentMasking:
    """The effects of an end-of-document token, as `DataConfig` selects them."""

    eod: int = IGNORE_INDEX
    attention: bool = False
    positions: bool = False
    loss: bool = False

    @classmethod
    def of(cls, config: DataConfig) -> DocumentMasking:
        """Return what a configuration selects; its `eod_token_id` must be set if it selects any effect."""
        if not config.marks_documents:
            return NO_DOCUMENT_MASKING
        assert config.eod_token_id is not None
        return cls(
            config.eod_token_id, config.reset_attention_mask, config.reset_position_ids, config.eod_mask_loss
        )

    @property
    def needs_document_ids(self) -> bool:
        """Whether attention or positions depend on documents."""
        return self.attention or self.positions

    def document_ids(self, tokens: Tensor) -> Tensor:
        """Return the index, within its sample, of each token's document: int32 [b, s], of tokens [b, s]."""
        ends = (tokens == self.eod).int()
        return ends.cumsum(dim=1, dtype=torch.int32) - ends

    def attention_inputs(self, document_ids: Tensor, dtype: torch.dtype) -> AttentionInputs:
        """Return what attention needs to know, with a mask in `dtype`, that of the activations."""
        mask = None
        if self.attention:
            is_hidden = document_ids[:, :, None] != document_ids[:, None, :]
            is_hidden |= torch.ones_like(is_hidden[0]).triu(1)
            mask = torch.zeros(is_hidden.shape, dtype=dtype, device=document_ids.device)
            mask = mask.masked_fill_(is_hidden, -torch.inf).unsqueeze(1)
        return AttentionInputs(mask, self.positions_of(document_ids))

    def positions_of(self, document_ids: Tensor) -> Tensor | None:
        """Return positions within documents, int64 [b, s]; None if positions are those in the sequence."""
        if not self.positions:
            return None
        positions = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
        is_first = torch.diff(document_ids, dim=1, prepend=document_ids[:, :1] - 1) != 0
        return positions - (positions * is_first).cummax(dim=1).values

    def targets(self, tokens: Tensor) -> Tensor:
        """Return targets [b, s] of tokens [b, s + 1], with IGNORE_INDEX where the loss does not count."""
        following = tokens[:, 1:]
        return following.masked_fill(tokens[:, :-1] == self.eod, IGNORE_INDEX) if self.loss else following


NO_DOCUMENT_MASKING = DocumentMasking()
"""Every sample is one document, whatever tokens are in it."""
