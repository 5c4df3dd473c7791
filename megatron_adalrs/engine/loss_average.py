"""The average of the loss over ranks, which every rank computes alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from megatron_adalrs.distributed.collectives import gather_numbers
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.model.document_mask import DocumentMasking


class LossAverage:
    """Averages losses over data-parallel ranks and context-parallel parts, the same float on every rank.

    Args:
        mesh: The process mesh. Only the ranks of the last pipeline stage know a loss.
        documents: Document masking, which decides which tokens count.
        device: Device of the collectives.
    """

    def __init__(self, mesh: ProcessMesh, documents: DocumentMasking, device: torch.device) -> None:
        self._mesh = mesh
        self._documents = documents
        self._device = device

    def mean(self, losses: np.ndarray) -> float:
        """Average the losses of all ranks, float64 [world size].

        The pipe is the slowest axis of the mesh, so the last ranks are those of the last stage. One rank of
        each tensor group is used: a group shares its samples, or its part of them.
        """
        last_stage = losses[-(self._mesh.world_size // self._mesh.pipe.size) :]
        return float(last_stage[:: self._mesh.tensor.size].mean())

    def counted_share(self, micro_batches: Sequence[np.ndarray]) -> float:
        """Return the share of this rank's tokens whose loss counts; the micro-batches have one shape."""
        if not self._documents.loss:
            return 1.0
        return float(np.mean([batch[:, :-1] != self._documents.eod for batch in micro_batches]))

    def scale(self, micro_batches: Sequence[np.ndarray]) -> float | None:
        """Return the factor from a mean over all tokens to one over the step's counted tokens. Collective.

        With one factor for all ranks, the loss does not depend on how samples are distributed over the mesh.
        None if every token counts, 0 if none does: the step has no loss then.
        """
        if not self._documents.loss:
            return None
        share = self.mean(gather_numbers([self.counted_share(micro_batches)], self._device)[:, 0])
        return 1.0 / share if share else 0.0

    def mean_of_counted(self, loss: float, shares: Sequence[float]) -> float:
        """Return the mean loss of counted tokens, given this rank's mean over all tokens. Collective.

        NaN if no token counts.
        """
        gathered = gather_numbers([loss, sum(shares) / len(shares)], self._device)
        loss = self.mean(gathered[:, 0])
        if not self._documents.loss:
            return loss
        share = self.mean(gathered[:, 1])
        return loss / share if share else math.nan
