"""The training engine on DeepSpeed's PipelineEngine: each rank runs the layers of one stage."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.runtime.utils import partition_balanced, partition_uniform
from torch import Tensor, nn

from megatron_adalrs.config import Config
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine.base import AcceptUpdate, Engine, StepResult
from megatron_adalrs.engine.update_gate import UpdateGate
from megatron_adalrs.model.initialization import WeightSource
from megatron_adalrs.model.pipeline import PipelineLayer, StageModules, pipeline_layers
from megatron_adalrs.optim.grad_clip import clip_pipeline_grad_norm

TIED_WEIGHT = "token_embedding"
"""Name under which DeepSpeed knows the weight that the first and the last layer share."""


class PipelineParallelEngine(Engine):
    """An engine whose model is split into stages.

    Every rank gets the micro-batches of its pipeline; only the first and the last stage use them.
    """

    def __init__(
        self, config: Config, vocab_size: int, mesh: ProcessMesh, weights: WeightSource | None = None
    ) -> None:
        super().__init__(config, vocab_size, mesh, weights)
        self._shape: tuple[int, ...] | None = None
        self._norm: float | None = None
        if self._clips_outside_deepspeed:
            self.deepspeed.pipeline_enable_backward_allreduce = mesh.data.size > 1

    def _build_update_gate(self) -> UpdateGate:
        if self._clips_outside_deepspeed:
            self.deepspeed.optimizer.register_step_pre_hook(self._clip_before_step)
        # The gate's hook runs after the clipping hook, when the norm is known.
        return super()._build_update_gate()

    def _build_model(self, config: Config, vocab_size: int, settings: dict[str, Any]) -> nn.Module:
        layers = pipeline_layers(config.model, vocab_size, self._layout, self._documents)
        shape = self._mesh.shape
        # By default DeepSpeed splits activations over the tensor ranks before it sends them. It assumes that
        # all of these ranks hold the same values, which they do not with sequence parallelism.
        settings["pipeline"] = settings.get("pipeline", {}) | {
            "pipe_partitioned": False,
            "grad_partitioned": False,
        }
        with redirect_stdout(io.StringIO()):  # the constructor prints
            model = _Stage(
                [_spec(layer) for layer in layers],
                topology=PipeModelDataParallelTopology(
                    num_pp=shape.pipe, num_mp=shape.tensor, num_dp=shape.data
                ),
                partition_method=config.parallel.pipeline_partition,
            )
        start, stop = model.parts[self._mesh.pipe.rank : self._mesh.pipe.rank + 2]
        mine = dict(zip((layer.name for layer in layers[start:stop]), model.forward_funcs, strict=True))
        self._as_gpt = StageModules(mine, vocab_size)
        self._set_initial_weights(self._as_gpt, config)
        if self._mesh.pipe.is_last:
            self._output = model.forward_funcs[-1]
            self._output.masked = self._documents.loss
            model.loss_fn = self._output.loss
        return model

    def named_weights(self) -> dict[str, nn.Parameter]:
        return dict(self._as_gpt.named_parameters())

    def train_batch(
        self, micro_batches: Sequence[np.ndarray], stop: bool = False, accept: AcceptUpdate | None = None
    ) -> StepResult:
        scale = self._loss_average.scale(micro_batches)
        self._ask_before_update(
            scale,
            accept and (lambda: accept(*self._reduce_loss_and_norm(self._loss_before_update(), self._norm))),
        )
        self._set_scale(scale)
        # The iterator ends with this step's micro-batches, since DeepSpeed never rewinds one.
        self.deepspeed.train_batch(self._pairs(micro_batches))
        return self._reduce_step(float(self.deepspeed.dp_group_loss), scale, self._norm, stop)

    def _loss_before_update(self) -> float:
        """Return what DeepSpeed's `dp_group_loss` will be on the last stage; NaN on the others."""
        if not self._mesh.pipe.is_last:
            return float("nan")
        return float(self.deepspeed.total_loss / self.deepspeed.gradient_accumulation_steps())

    @torch.no_grad()
    def evaluate(self, steps: Iterator[Sequence[np.ndarray]]) -> float:
        losses: list[Tensor] = []
        shares: list[float] = []
        self._set_scale(None)
        for batches in steps:
            shares += [self._loss_average.counted_share([batch]) for batch in batches]
            stage_losses = self.deepspeed.eval_batch(
                self._pairs(batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(batches)
            )
            losses += stage_losses or []
        loss = float(torch.stack(losses).float().mean()) if self._mesh.pipe.is_last else float("nan")
        return self._loss_average.mean_of_counted(loss, shares)

    def _set_scale(self, scale: float | None) -> None:
        if self._mesh.pipe.is_last:
            self._output.scale = 1.0 if scale is None else scale

    def _pairs(self, micro_batches: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Return pairs (inputs, targets), each int64 [b, s], for the first and the last stage."""
        if self._shape != micro_batches[0].shape:
            # Stages exchange the shape of activations once. All of them see the new shape and reset it here.
            self.deepspeed.reset_activation_shape()
            self._shape = micro_batches[0].shape
        batches = (torch.from_numpy(batch) for batch in micro_batches)
        return ((batch[:, :-1], self._documents.targets(batch)) for batch in batches)

    def _clip_before_step(self, *_: Any) -> None:
        parameters = list(self.module.parameters())
        self._norm = clip_pipeline_grad_norm(parameters, self._clip_grad, self._mesh, self.device)


def stage_bounds(counts: Sequence[int], stages: int, method: str) -> list[int]:
    """Return how DeepSpeed splits the layers: stage i has layers bounds[i] to bounds[i + 1] - 1.

    Args:
        counts: number of parameters of each layer.
        stages: number of stages.
        method: "parameters" or "uniform", see `ParallelConfig.pipeline_partition`.
    """
    is_uniform = method == "uniform"
    bounds: list[int] = (
        partition_uniform(len(counts), stages) if is_uniform else partition_balanced(counts, stages)
    )
    return bounds


class _Stage(PipelineModule):  # type: ignore[misc]  # DeepSpeed is untyped
    """DeepSpeed's module of one stage, with two methods corrected."""

    def _count_layer_params(self) -> list[int]:
        # DeepSpeed would allocate every layer of the model on every rank, one at a time.
        with torch.device("meta"):
            counts: list[int] = super()._count_layer_params()
        return counts

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        # With gradients enabled, autograd would record the broadcast and warn at the first backward pass.
        super()._synchronize_tied_weights()


def _spec(layer: PipelineLayer) -> LayerSpec:
    if layer.tied_weight is None:
        spec = LayerSpec(nn.Module)
    else:
        spec = TiedLayerSpec(TIED_WEIGHT, nn.Module, tied_weight_attr=layer.tied_weight)
    # A LayerSpec takes a class and its arguments, but a PipelineLayer has a function that builds it.
    spec.build = lambda log=False: layer.build()
    return spec
