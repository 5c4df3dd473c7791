"""The training engine on DeepSpeed's data-parallel engine, with ZeRO stages 0 to 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor, nn

from megatron_adalrs.config import Config
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine.base import AcceptUpdate, Engine, StepResult
from megatron_adalrs.engine.mpu import ModelParallelUnit
from megatron_adalrs.model.gpt import GPT
from megatron_adalrs.model.initialization import WeightSource
from megatron_adalrs.optim.grad_clip import clip_grad_norm
from megatron_adalrs.parallel.layers import shard_of


class DataParallelEngine(Engine):
    """An engine in which every rank runs all layers, or its tensor shards of them."""

    def __init__(
        self, config: Config, vocab_size: int, mesh: ProcessMesh, weights: WeightSource | None = None
    ) -> None:
        super().__init__(config, vocab_size, mesh, weights)
        # FP16_UnfusedOptimizer, in low precision without ZeRO, looks for the mark of a shard on gradients.
        marks_gradients = config.training.precision != "fp32" and config.training.zero_stage == 0
        self._marked = [p for p in self.module.parameters() if shard_of(p)] if marks_gradients else []
        if self._clips_outside_deepspeed and mesh.replica.size == 1:
            # A single replica has nothing to average, but DeepSpeed would flatten and copy every gradient.
            self.deepspeed.enable_backward_allreduce = False

    def _model_parallel_unit(self) -> ModelParallelUnit | None:
        return ModelParallelUnit(self._mesh) if self._mesh.tensor.size > 1 else None

    def _build_model(self, config: Config, vocab_size: int, settings: dict[str, Any]) -> nn.Module:
        is_sharded = config.training.zero_stage == 3
        with deepspeed.zero.Init(
            config_dict_or_path=settings,
            enabled=is_sharded,
            data_parallel_group=self._mpu.get_data_parallel_group() if self._mpu else None,
            mpu=self._mpu,
        ):
            model = GPT(config.model, vocab_size, self._layout, self._documents)
        self._set_initial_weights(model, config, whole=_gathered if is_sharded else nullcontext)
        return model

    def train_batch(
        self, micro_batches: Sequence[np.ndarray], stop: bool = False, accept: AcceptUpdate | None = None
    ) -> StepResult:
        self.module.train()
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        scale = self._loss_average.scale(micro_batches)
        for index, batch in enumerate(micro_batches, start=1):
            loss = self.deepspeed(self._to_device(batch))
            if scale is not None:
                loss = loss * scale
            self.deepspeed.backward(loss)
            total += loss.detach()
            if index < len(micro_batches):
                self.deepspeed.step()
        norm = self._clip()
        for parameter in self._marked:
            parameter.grad.tensor_model_parallel = True  # type: ignore[union-attr]  # DeepSpeed's attribute
        self._ask_before_update(
            scale,
            accept and (lambda: accept(*self._reduce_loss_and_norm(float(total) / len(micro_batches), norm))),
        )
        self.deepspeed.step()
        return self._reduce_step(float(total) / len(micro_batches), scale, norm, stop)

    @torch.no_grad()
    def evaluate(self, steps: Iterator[Sequence[np.ndarray]]) -> float:
        self.module.eval()
        losses = []
        shares = []
        for batch in (batch for batches in steps for batch in batches):
            losses.append(self.deepspeed(self._to_device(batch)).float())
            shares.append(self._loss_average.counted_share([batch]))
        return self._loss_average.mean_of_counted(float(torch.stack(losses).mean()), shares)

    def _clip(self) -> Tensor | None:
        """Clip gradients and return their norm; None if DeepSpeed does it in its `step`."""
        if not self._clips_outside_deepspeed:
            return None
        return clip_grad_norm(list(self.module.parameters()), self._clip_grad, self._mesh.tensor)

    def _to_device(self, batch: np.ndarray) -> Tensor:
        return torch.from_numpy(batch).to(self.device, non_blocking=True)


def _gathered(parameter: nn.Parameter) -> Any:
    """Return a context in which a ZeRO-3 parameter has its full shape; rank 0's changes reach all ranks."""
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
