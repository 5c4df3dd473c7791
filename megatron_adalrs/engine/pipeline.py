"""The training engine on DeepSpeed's PipelineEngine: each rank holds the layers of one stage."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_adalrs.config import Config
from megatron_adalrs.distributed.collectives import gather_numbers
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine.data_parallel import Accept, Engine, StepResult
from megatron_adalrs.engine.update_gate import UpdateGate
from megatron_adalrs.model.gpt import WeightSource
from megatron_adalrs.model.pipeline import PipelineLayer, arranged_as_gpt, pipeline_layers
from megatron_adalrs.parallel.layers import shard_of

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec  # isort: skip
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology  # isort: skip
from deepspeed.runtime.utils import partition_balanced, partition_uniform  # isort: skip

TIE = "token_embedding"


class PipelineParallelEngine(Engine):
    """A model cut into stages. Every rank is given its pipeline's micro-batches; the first and last stage use
    them."""

    def __init__(
        self, config: Config, vocab_size: int, mesh: ProcessMesh, weights: WeightSource | None = None
    ) -> None:
        super().__init__(config, vocab_size, mesh, weights)
        self._shape: tuple[int, ...] | None = None
        self._norm: float | None = None
        if self._is_plain:
            self.deepspeed.pipeline_enable_backward_allreduce = mesh.data.size > 1

    def _make_gate(self) -> UpdateGate:
        if self._is_plain:
            # DeepSpeed would clip by the norm of the first stage's gradients alone, and not tell it.
            self.deepspeed.optimizer.register_step_pre_hook(self._clip_before_step)
        return super()._make_gate()  # which asks afterwards, when the norm is known

    def _model_parallel_unit(self) -> None:
        """None: PipelineModule makes its own, from the topology."""

    def _build_model(self, config: Config, vocab_size: int, settings: dict[str, Any]) -> nn.Module:
        layers = pipeline_layers(config.model, vocab_size, self._layout, self._documents)
        shape = self._mesh.shape
        # DeepSpeed would cut what stages send each other into parts, one a tensor rank, as if all ranks held
        # the same: with sequence parallelism they do not.
        settings["pipeline"] = settings.get("pipeline", {}) | {
            "pipe_partitioned": False,
            "grad_partitioned": False,
        }
        with redirect_stdout(io.StringIO()):  # its constructor prints
            model = _Stage(
                [_spec(layer) for layer in layers],
                topology=PipeModelDataParallelTopology(
                    num_pp=shape.pipe, num_mp=shape.tensor, num_dp=shape.data
                ),
                partition_method=config.parallel.pipeline_partition,
            )
        start, stop = model.parts[self._mesh.pipe.rank : self._mesh.pipe.rank + 2]
        mine = dict(zip((layer.name for layer in layers[start:stop]), model.forward_funcs, strict=True))
        self._as_gpt = arranged_as_gpt(mine, vocab_size)
        self._set_initial_weights(self._as_gpt, config)
        if self._mesh.pipe.is_last:
            self._output = model.forward_funcs[-1]
            self._output.masked = self._documents.loss
            model.loss_fn = self._output.loss
        return model

    def named_weights(self) -> dict[str, nn.Parameter]:
        return dict(self._as_gpt.named_parameters())

    def train_batch(
        self, micro_batches: Sequence[np.ndarray], stop: bool = False, accept: Accept | None = None
    ) -> StepResult:
        self._gate.set(
            accept and (lambda: accept(*self._reduce_loss_and_norm(self._loss_before_update(), self._norm)))
        )
        self._set_scale(self._loss_scale(micro_batches))
        # The iterator holds this step's micro-batches and no more: DeepSpeed never rewinds one.
        self.deepspeed.train_batch(self._pairs(micro_batches))
        return self._result(float(self.deepspeed.dp_group_loss), self._norm, stop)

    def _loss_before_update(self) -> float:
        """What DeepSpeed will call `dp_group_loss`: on the last stage, whose loss counts. NaN on others."""
        if not self._mesh.pipe.is_last:
            return float("nan")
        return float(self.deepspeed.total_loss / self.deepspeed.gradient_accumulation_steps())

    @torch.no_grad()
    def evaluate(self, steps: Iterator[Sequence[np.ndarray]]) -> float:
        losses: list[Tensor] = []
        shares: list[float] = []
        self._set_scale(None)
        for batches in steps:
            shares += [self._counted_share([batch]) for batch in batches]
            here = self.deepspeed.eval_batch(
                self._pairs(batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(batches)
            )
            losses += here or []
        mine = float(torch.stack(losses).float().mean()) if self._mesh.pipe.is_last else float("nan")
        return self._mean_of_counted(mine, shares)

    def _set_scale(self, scale: float | None) -> None:
        if self._mesh.pipe.is_last:
            self._output.scale = scale or 1.0

    def _mean_loss(self, everyone: np.ndarray) -> float:
        # The pipe is the slowest axis of the mesh, so the last stage's ranks are the last ones.
        return super()._mean_loss(everyone[-(self._mesh.world_size // self._mesh.pipe.size) :])

    def _pairs(self, micro_batches: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, targets), each int64 [b, s], as the pipe's two ends want them."""
        if self._shape != micro_batches[0].shape:
            # Stages tell each other the shape of activations once; all of them forget it together here.
            self.deepspeed.reset_activation_shape()
            self._shape = micro_batches[0].shape
        batches = (torch.from_numpy(batch) for batch in micro_batches)
        return ((batch[:, :-1], self._documents.targets(batch)) for batch in batches)

    def _clip_before_step(self, *_: Any) -> None:
        """Clip by the global norm: over all stages and shards, what several of them hold counted once."""
        parameters = list(self.module.parameters())
        counted = [
            parameter.grad.float().square().sum(dtype=torch.float64)
            for parameter in parameters
            if parameter.grad is not None
            and not parameter.ds_pipe_replicated
            and (self._mesh.tensor.is_first or shard_of(parameter))
        ]
        mine = float(torch.stack(counted).sum()) if counted else 0.0
        # Replicas hold the same gradients: their sums are averaged, in one order, for the same bits
        # everywhere.
        total = float(gather_numbers([mine], self.device).sum()) / self._mesh.data.size
        self._norm = total**0.5
        norm = torch.tensor(self._norm, dtype=torch.float32, device=self.device)
        nn.utils.clip_grads_with_norm_(parameters, self._clip_grad or float("inf"), norm)


def stage_bounds(counts: Sequence[int], stages: int, method: str) -> list[int]:
    """Where DeepSpeed cuts the pipe: stage i has the layers bounds[i] to bounds[i + 1] - 1.

    Args:
        counts: parameters of each layer.
        method: "parameters" or "uniform", see `ParallelConfig.pipeline_partition`.
    """
    if method == "uniform":
        return partition_uniform(len(counts), stages)
    return partition_balanced(counts, stages)


class _Stage(PipelineModule):
    """DeepSpeed's module of one stage, with two of its habits mended."""

    def _count_layer_params(self) -> list[int]:
        # It would allocate every layer of the model on every rank, one at a time.
        with torch.device("meta"):
            return super()._count_layer_params()

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        # Otherwise autograd records the broadcast and warns of it at the first backward pass.
        super()._synchronize_tied_weights()


def _spec(layer: PipelineLayer) -> LayerSpec:
    if layer.tied_weight is None:
        spec = LayerSpec(nn.Module)
    else:
        spec = TiedLayerSpec(TIE, nn.Module, tied_weight_attr=layer.tied_weight)
    # A LayerSpec wants a class and its arguments; ours know how to build themselves.
    spec.build = lambda log=False: layer.build()
    return spec
