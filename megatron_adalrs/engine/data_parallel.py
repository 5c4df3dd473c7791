"""The training engine on DeepSpeed's data-parallel engine, and what the pipeline's engine shares with it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_adalrs.config import Config
from megatron_adalrs.distributed.collectives import gather_numbers
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine.checkpoint_io import CheckpointFiles
from megatron_adalrs.engine.deepspeed_config import deepspeed_settings
from megatron_adalrs.engine.master_weights import weights_from_masters
from megatron_adalrs.engine.mpu import ModelParallelUnit
from megatron_adalrs.engine.process_group import computes_on_cpu, deepspeed, get_accelerator
from megatron_adalrs.engine.reshard import TrainingTensors, write_training
from megatron_adalrs.engine.update_gate import UpdateGate
from megatron_adalrs.model.document_mask import DocumentMasking
from megatron_adalrs.model.gpt import GPT, WeightSource, initialise, write_weights
from megatron_adalrs.optim.optimizer import build_optimizer
from megatron_adalrs.parallel.layers import shard_of
from megatron_adalrs.parallel.layout import Layout

COUNTERS = ("micro_steps", "global_steps", "global_samples", "skipped_steps")
Accept = Callable[[float, float], bool]
"""Whether to make an update: asked before it, on every rank with the same loss and gradient norm."""
LOSS_SCALER_COUNTERS = ("cur_scale", "cur_iter", "last_overflow_iter", "last_rescale_iter", "cur_hysteresis")


class StepResult(NamedTuple):
    """One optimizer step, as every rank knows it: the same values, to the bit, on all of them."""

    loss: float
    """Averaged over micro-batches and data-parallel ranks, and over the context-parallel parts of the
    sequences."""
    grad_norm: float
    """Global norm before clipping; infinite or NaN where a gradient is."""
    applied: bool
    """False where weights and optimizer are as before: a gradient overflowed, or the update was not
    accepted."""
    stop_requested: bool
    """Whether any rank asked to stop."""


class Engine:
    """A model under DeepSpeed: one call a step, one loss for all ranks.

    Args:
        vocab_size: before padding.
        mesh: with its groups (`ProcessMesh.with_groups`) where it has a tensor axis.
        weights: where they come from at the start; None: they are drawn.
    """

    def __init__(
        self, config: Config, vocab_size: int, mesh: ProcessMesh, weights: WeightSource | None = None
    ) -> None:
        self._mesh, self._weights, self._vocab_size = mesh, weights, vocab_size
        self._layout = Layout.of(config, mesh.tensor, mesh.context)
        self._documents = DocumentMasking.of(config.data)
        self._mpu = self._model_parallel_unit()
        # DeepSpeed keeps the last engine's mpu in a global, and never puts it back to none.
        deepspeed.utils.groups.mpu = self._mpu
        settings = deepspeed_settings(config, mesh.data.size)
        # DeepSpeed works it out from its own idea of data parallelism, which includes the context axis.
        del settings["train_batch_size"]
        training = config.training
        model = self._build_model(config, vocab_size, settings)
        # In fp32 without ZeRO, DeepSpeed clips without telling the norm: clipping is done here then.
        self._is_plain = training.zero_stage == 0 and training.precision == "fp32"
        self._clip_grad = config.optimizer.clip_grad
        if self._is_plain:
            settings["gradient_clipping"] = 0.0
        if training.zero_stage:
            # DeepSpeed allocates this in full, whatever the size of the model.
            settings["zero_optimization"].setdefault("reduce_bucket_size", reduce_bucket_size(held_by(model)))
        model.to(get_accelerator().current_device_name())
        self.deepspeed, *_ = deepspeed.initialize(
            model=model, optimizer=_optimizer(model, config, settings), config=settings, mpu=self._mpu
        )
        self.files = CheckpointFiles()
        """What writes the checkpoint files of this rank."""
        self.deepspeed.checkpoint_engine = self.files
        self.deepspeed._copy_recovery_script = self.files.attempt(self.deepspeed._copy_recovery_script)
        # FP16_UnfusedOptimizer, in low precision without ZeRO, looks for the mark of a shard on gradients.
        marks_gradients = training.precision != "fp32" and training.zero_stage == 0
        self._marked = [p for p in self.module.parameters() if shard_of(p)] if marks_gradients else []
        self.device = torch.device(self.deepspeed.device)
        self._gate = self._make_gate()
        # One rank has nobody to average with, yet DeepSpeed would flatten, reduce and copy back every
        # gradient.
        if self._is_plain and mesh.replica.size == 1:
            self.deepspeed.enable_backward_allreduce = False

    def _model_parallel_unit(self) -> ModelParallelUnit | None:
        return ModelParallelUnit(self._mesh) if self._mesh.tensor.size > 1 else None

    def _make_gate(self) -> UpdateGate:
        return UpdateGate(self._base_optimizer)

    def _build_model(self, config: Config, vocab_size: int, settings: dict[str, Any]) -> nn.Module:
        sharded = config.training.zero_stage == 3
        with deepspeed.zero.Init(
            config_dict_or_path=settings,
            enabled=sharded,
            data_parallel_group=self._mpu.get_data_parallel_group() if self._mpu else None,
            mpu=self._mpu,
        ):
            model = GPT(config.model, vocab_size, self._layout, self._documents)
        self._set_initial_weights(model, config, whole=_whole if sharded else nullcontext)
        return model

    def _set_initial_weights(
        self, model: nn.Module, config: Config, whole: Callable[..., Any] = nullcontext
    ) -> None:
        """Before DeepSpeed sees the model: it rounds weights and makes masters of them as it always does."""
        if self._weights is None:
            initialise(model, config.model, config.training.seed, whole)
        else:
            write_weights(model, self._weights, whole)

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    @property
    def parameters_held(self) -> int:
        """Parameters of the part of the model that this rank trains; under ZeRO-3 they are sharded
        further."""
        return held_by(self.module)

    def named_weights(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by GPT's names for them: a tied weight has one name on both ends of a
        pipe."""
        return dict(self.module.named_parameters())

    def set_lr(self, lr: float) -> None:
        """The one place that writes the learning rate: every parameter group gets it."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr

    def train_batch(
        self, micro_batches: Sequence[np.ndarray], stop: bool = False, accept: Accept | None = None
    ) -> StepResult:
        """One optimizer step.

        Args:
            micro_batches: this rank's, each int64 [micro_batch_size, seq_length + 1].
            stop: whether this rank asks all ranks to stop after the step.
            accept: where it answers False, weights and optimizer state stay as they are.
        """
        self.module.train()
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        scale = self._loss_scale(micro_batches)
        for last, batch in _mark_last(micro_batches):
            loss = self.deepspeed(self._to_device(batch))
            if scale is not None:
                loss = loss * scale
            self.deepspeed.backward(loss)
            total += loss.detach()
            if not last:
                self.deepspeed.step()
        norm = self._clip() if self._is_plain else None
        for parameter in self._marked:
            parameter.grad.tensor_model_parallel = True
        self._gate.set(
            accept and (lambda: accept(*self._reduce_loss_and_norm(float(total) / len(micro_batches), norm)))
        )
        self.deepspeed.step()
        return self._result(float(total) / len(micro_batches), norm, stop)

    @torch.no_grad()
    def evaluate(self, steps: Iterator[Sequence[np.ndarray]]) -> float:
        """Mean loss over steps of this rank's micro-batches, averaged over ranks; the same float on all of
        them."""
        self.module.eval()
        losses, shares = [], []
        for batch in (batch for batches in steps for batch in batches):
            losses.append(self.deepspeed(self._to_device(batch)).float())
            shares.append(self._counted_share([batch]))
        return self._mean_of_counted(float(torch.stack(losses).mean()), shares)

    def _counted_share(self, micro_batches: Sequence[np.ndarray]) -> float:
        """The share of this rank's tokens, in micro-batches of one shape, whose loss counts."""
        if not self._documents.loss:
            return 1.0
        return float(np.mean([batch[:, :-1] != self._documents.eod for batch in micro_batches]))

    def _loss_scale(self, micro_batches: Sequence[np.ndarray]) -> float | None:
        """What makes means over all tokens one over those of the whole step that count; None where all do.
        Collective.

        So the loss does not depend on how the mesh deals out samples that count differently.
        """
        if not self._documents.loss:
            return None
        share = self._mean_loss(gather_numbers([self._counted_share(micro_batches)], self.device)[:, 0])
        return 1.0 / share if share else 1.0

    def _mean_of_counted(self, loss: float, shares: Sequence[float]) -> float:
        """Mean loss of the tokens that count, from each rank's mean over all of its own. Collective."""
        everyone = gather_numbers([loss, sum(shares) / len(shares)], self.device)
        loss = self._mean_loss(everyone[:, 0])
        return loss / (self._mean_loss(everyone[:, 1]) or 1.0) if self._documents.loss else loss

    def _result(self, loss: float, norm: Tensor | float | None, stop: bool) -> StepResult:
        """What all ranks make of what each of them knows of a step. Collective."""
        applied = bool(self.deepspeed.was_step_applied()) and not self._gate.refused
        everyone = gather_numbers([loss, self._grad_norm(norm), applied, stop], self.device)
        return StepResult(
            loss=self._mean_loss(everyone[:, 0]),
            grad_norm=float(everyone[0, 1]),
            applied=bool(everyone[:, 2].all()),
            stop_requested=bool(everyone[:, 3].any()),
        )

    def _reduce_loss_and_norm(self, loss: float, norm: Tensor | float | None) -> tuple[float, float]:
        """Loss and gradient norm before an update: to the bit what `_result` makes of the same numbers.
        Collective."""
        everyone = gather_numbers([loss, self._grad_norm(norm)], self.device)
        return self._mean_loss(everyone[:, 0]), float(everyone[0, 1])

    def _grad_norm(self, norm: Tensor | float | None) -> float:
        """The norm that is known here, or DeepSpeed's: -1 is its word for one that is not finite."""
        known = getattr(self.deepspeed.optimizer, "_global_grad_norm", None) if norm is None else norm
        return float("nan") if known is None or known < 0 else float(known)

    def _mean_loss(self, everyone: np.ndarray) -> float:
        """The loss, from every rank's, float64 [world size]: each tensor group has its own samples, or part
        of them."""
        return float(everyone[:: self._mesh.tensor.size].mean())

    def training_state_tensors(self) -> dict[Hashable, Tensor]:
        """The tensors that decide the following steps, in place: what the optimizer works on, its state,
        buffers.

        Weights that are rounded masters are left out: `sync_weights_from_masters` makes them anew. No tensor
        comes twice. Keys name a tensor for good, so that one that is born later is recognised as new. Valid
        between steps.
        """
        found: dict[Hashable, Tensor] = {
            ("buffer", name): buffer for name, buffer in _persistent_buffers(self.module)
        }
        for index, flat in enumerate(getattr(self.deepspeed.optimizer, "fp32_partitioned_groups_flat", [])):
            found["optimized", "shard", index] = flat
        # ZeRO-3 empties the groups of the base optimizer between steps.
        optimized = [
            parameter for group in self._base_optimizer.param_groups for parameter in group["params"]
        ]
        known = {id(tensor) for tensor in found.values()}
        found |= {("optimized", index): p for index, p in enumerate(optimized) if id(p) not in known}
        for index, state in enumerate(self._base_optimizer.state.values()):
            found |= {
                ("state", index, name): value for name, value in state.items() if torch.is_tensor(value)
            }
        return found

    def sync_weights_from_masters(self) -> None:
        """Follow up on live tensors that were written to: weights are rounded masters. Collective."""
        weights_from_masters(self.deepspeed.optimizer, self.module)

    def before_update(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have a function called before each update writes to live tensors. Returns what ends that."""
        return self._base_optimizer.register_step_pre_hook(lambda *_: callback()).remove

    def counters(self) -> dict[str, Any]:
        """DeepSpeed's step counters, the loss scaler's where there is one, and an optimizer's that are no
        tensors."""
        values = {name: getattr(self.deepspeed, name) for name in COUNTERS}
        values["state"] = [_numbers(state) for state in self._base_optimizer.state.values()]
        for owner in self._loss_scalers():
            values |= {
                f"{type(owner).__name__}.{k}": getattr(owner, k)
                for k in LOSS_SCALER_COUNTERS
                if hasattr(owner, k)
            }
        return values

    def set_counters(self, values: dict[str, Any]) -> None:
        for name in COUNTERS:
            setattr(self.deepspeed, name, values[name])
        for index, state in enumerate(self._base_optimizer.state.values()):
            saved = values["state"][index] if index < len(values["state"]) else {}
            state.update(dict.fromkeys(_numbers(state), 0) | saved)  # 0: born since then
        for owner in self._loss_scalers():
            for name in LOSS_SCALER_COUNTERS:
                if (key := f"{type(owner).__name__}.{name}") in values:
                    setattr(owner, name, values[key])

    def save(self, folder: Path, secure: Callable[[Path], str] | None = None) -> None:
        """Write DeepSpeed's files of this rank under `folder`; with `secure`, copy what is in them and begin
        to.

        Collective.

        `files.finish()` ends it, and says what could not be written: here an error would part this rank from
        the rest.
        """
        self.files.begin(copied=secure is not None)
        self.deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        if secure is not None:
            self.files.start(secure)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote, into an engine that has not stepped yet. Collective.

        Raises:
            ValueError: DeepSpeed found nothing that it can load there.
        """
        loaded, _ = self.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
        if loaded is None:
            raise ValueError(f"--load: DeepSpeed finds no checkpoint in {folder}")
        self._count_micro_steps()

    def load_resharded(self, saved: TrainingTensors) -> None:
        """Take over what another mesh or ZeRO stage saved, in an engine that has not stepped yet.
        Collective."""
        write_training(
            self.deepspeed.optimizer, self._base_optimizer, self.named_weights(), self._vocab_size, saved
        )
        self.sync_weights_from_masters()
        for name, value in saved.counters.items():
            setattr(self.deepspeed, name, value)
        self._count_micro_steps()

    def _count_micro_steps(self) -> None:
        """DeepSpeed does not save them."""
        self.deepspeed.micro_steps = (
            self.deepspeed.global_steps * self.deepspeed.gradient_accumulation_steps()
        )

    def _clip(self) -> Tensor:
        parameters, largest, axis = (
            list(self.module.parameters()),
            self._clip_grad or float("inf"),
            self._mesh.tensor,
        )
        if axis.size == 1:
            return nn.utils.clip_grad_norm_(parameters, largest)
        counted = [p.grad for p in parameters if axis.is_first or shard_of(p)]
        square = nn.utils.get_total_norm(counted).square()
        dist.all_reduce(square, group=axis.group)
        norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        return norm

    def _to_device(self, batch: np.ndarray) -> Tensor:
        return torch.from_numpy(batch).to(self.device, non_blocking=True)

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed's wraps, or the only one."""
        return getattr(self.deepspeed.optimizer, "optimizer", self.deepspeed.optimizer)

    def _loss_scalers(self) -> list[Any]:
        optimizer = self.deepspeed.optimizer
        return [owner for owner in (optimizer, getattr(optimizer, "loss_scaler", None)) if owner is not None]


def _optimizer(model: nn.Module, config: Config, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """torch's AdamW, or DeepSpeed's on the processor where an accelerator's optimizer state is offloaded to
    it."""
    if not settings["zero_optimization"].get("offload_optimizer") or computes_on_cpu():
        return build_optimizer(model, config.optimizer)
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # takes a minute to compile, once for an environment

    return build_optimizer(model, config.optimizer, DeepSpeedCPUAdam)


def held_by(module: nn.Module) -> int:
    """Parameters of a module; under ZeRO-3, those of which a rank holds a shard, at their full size."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def reduce_bucket_size(parameters: int) -> int:
    """Elements of the buffer in which ZeRO gathers gradients to reduce them: DeepSpeed's default, or what is
    needed."""
    return min(500_000_000, parameters)


def _whole(parameter: nn.Parameter) -> Any:
    """Context in which a ZeRO-3 parameter has its full shape; what the first rank writes reaches all."""
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that training may change; a module recomputes the others from its arguments."""
    for prefix, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer


def _numbers(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not torch.is_tensor(value)}


def _mark_last(items: Sequence[Any]) -> Iterator[tuple[bool, Any]]:
    return ((index == len(items) - 1, item) for index, item in enumerate(items))
