"""The training engine: the part that the data-parallel and the pipeline engine share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from megatron_adalrs.config import Config
from megatron_adalrs.distributed.collectives import gather_numbers
from megatron_adalrs.distributed.process_mesh import ProcessMesh
from megatron_adalrs.engine.checkpoint_io import CheckpointFiles
from megatron_adalrs.engine.deepspeed_config import deepspeed_settings, settings_beside_flags
from megatron_adalrs.engine.learning_rate import apply_learning_rate
from megatron_adalrs.engine.loss_average import LossAverage
from megatron_adalrs.engine.master_weights import weights_from_masters
from megatron_adalrs.engine.mpu import ModelParallelUnit
from megatron_adalrs.engine.optimizer_settings import read_settings, write_settings
from megatron_adalrs.engine.process_group import computes_on_cpu
from megatron_adalrs.engine.reshard import TrainingTensors, write_training_state
from megatron_adalrs.engine.training_state import (
    base_optimizer,
    read_counters,
    training_state_tensors,
    write_counters,
)
from megatron_adalrs.engine.update_gate import UpdateGate
from megatron_adalrs.model.document_mask import DocumentMasking
from megatron_adalrs.model.initialization import (
    FullShape,
    LanguageModel,
    WeightSource,
    init_weights,
    write_weights,
)
from megatron_adalrs.optim.grad_clip import clips_outside_deepspeed
from megatron_adalrs.optim.optimizer import build_optimizer
from megatron_adalrs.parallel.layout import Layout

AcceptUpdate = Callable[[float, float], bool]
"""Called before an update, on every rank with the same loss and gradient norm; False skips the update."""


class StepResult(NamedTuple):
    """The result of one optimizer step: the same bits on every rank."""

    loss: float | None
    """Mean over micro-batches, data-parallel ranks and context-parallel parts of the sequences; None if no
    target of the step counts (`eod_mask_loss`)."""
    grad_norm: float
    """Global norm before clipping; infinite or NaN if a gradient is."""
    applied: bool
    """False if weights and optimizer are unchanged: a gradient overflowed, the update was not accepted, or
    there is no loss."""
    stop_requested: bool
    """Whether any rank requested a stop."""


class Engine(ABC):
    """A model and its optimizer under DeepSpeed. One call is one step; every rank gets the same result.

    Args:
        config: the configuration of the run.
        vocab_size: size of the vocabulary before padding.
        mesh: the process mesh; with its groups (`ProcessMesh.with_groups`) if its tensor axis has more than
            one rank.
        weights: source of the initial weights; None draws them from `config.training.seed`.
    """

    def __init__(
        self, config: Config, vocab_size: int, mesh: ProcessMesh, weights: WeightSource | None = None
    ) -> None:
        self._mesh = mesh
        self._weights = weights
        self._vocab_size = vocab_size
        self._layout = Layout.of(config, mesh.tensor, mesh.context)
        self._documents = DocumentMasking.of(config.data)
        self._clip_grad = config.optimizer.clip_grad
        self._clips_outside_deepspeed = clips_outside_deepspeed(config.training)
        self._mpu = self._model_parallel_unit()
        # DeepSpeed keeps the last engine's mpu in a global variable and never resets it.
        deepspeed.utils.groups.mpu = self._mpu
        settings = deepspeed_settings(config, mesh.data.size)
        self.settings_beside_flags = settings_beside_flags(settings)
        """DeepSpeed's settings that no flag sets, for checkpoints."""
        # DeepSpeed derives it from its own data-parallel size, which includes the context axis.
        del settings["train_batch_size"]
        model = self._build_model(config, vocab_size, settings)
        self.deepspeed = self._initialize_deepspeed(model, config, settings)
        self.files = CheckpointFiles()
        """Writes the checkpoint files of this rank."""
        self.deepspeed.checkpoint_engine = self.files
        self.deepspeed._copy_recovery_script = self.files.attempt(self.deepspeed._copy_recovery_script)
        self.device = torch.device(self.deepspeed.device)
        self._loss_average = LossAverage(mesh, self._documents, self.device)
        self._gate = self._build_update_gate()

    def _initialize_deepspeed(self, model: nn.Module, config: Config, settings: dict[str, Any]) -> Any:
        if self._clips_outside_deepspeed:
            settings["gradient_clipping"] = 0.0
        if config.training.zero_stage:
            # DeepSpeed allocates the whole bucket, whatever the size of the model.
            bucket_size = reduce_bucket_size(count_local_parameters(model))
            settings["zero_optimization"].setdefault("reduce_bucket_size", bucket_size)
        model.to(get_accelerator().current_device_name())
        optimizer = _build_optimizer(model, config, settings)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=self._mpu)
        return engine

    def _model_parallel_unit(self) -> ModelParallelUnit | None:
        """Return the description of the mesh for DeepSpeed; None if it needs none."""
        return None

    def _build_update_gate(self) -> UpdateGate:
        return UpdateGate(self._base_optimizer)

    @abstractmethod
    def _build_model(self, config: Config, vocab_size: int, settings: dict[str, Any]) -> nn.Module:
        """Build this rank's part of the model with its initial weights; may change DeepSpeed's settings."""

    def _set_initial_weights(
        self, model: LanguageModel, config: Config, whole: FullShape = nullcontext
    ) -> None:
        """Set the weights before DeepSpeed gets the model, which then rounds them and makes the masters."""
        if self._weights is None:
            init_weights(model, config.model, config.training.seed, whole)
        else:
            write_weights(model, self._weights, whole)

    @property
    def module(self) -> nn.Module:
        """This rank's part of the model."""
        module: nn.Module = self.deepspeed.module
        return module

    @property
    def parameters_held(self) -> int:
        """Number of parameters in this rank's part of the model, before ZeRO-3 shards them further."""
        return count_local_parameters(self.module)

    def named_weights(self) -> dict[str, nn.Parameter]:
        """Return this rank's parameters by GPT's names. A tied weight has one name on both stages."""
        return dict(self.module.named_parameters())

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of every parameter group. Nothing else writes it."""
        apply_learning_rate(self.deepspeed.optimizer, lr)

    @abstractmethod
    def train_batch(
        self, micro_batches: Sequence[np.ndarray], stop: bool = False, accept: AcceptUpdate | None = None
    ) -> StepResult:
        """Run one optimizer step. Collective.

        Args:
            micro_batches: this rank's micro-batches, each int64 [micro_batch_size, seq_length + 1].
            stop: whether this rank requests that all ranks stop after the step.
            accept: if it returns False, weights and optimizer state stay unchanged.
        """

    @abstractmethod
    def evaluate(self, steps: Iterator[Sequence[np.ndarray]]) -> float:
        """Return the mean loss over steps of micro-batches and over ranks, the same float on every rank.

        Collective.
        """

    def _ask_before_update(self, scale: float | None, accept: Callable[[], bool] | None) -> None:
        """Set what decides on the update of a step: `accept`, or no update if its loss has the scale 0."""
        self._gate.set((lambda: False) if scale == 0 else accept)

    def _reduce_step(
        self, loss: float, scale: float | None, norm: Tensor | float | None, stop: bool
    ) -> StepResult:
        """Combine what each rank knows of a step into the result that all ranks return. Collective.

        Args:
            loss: this rank's loss.
            scale: the factor that the loss contains, as `LossAverage.scale` returns it.
            norm: see `_grad_norm`.
            stop: whether this rank requests a stop.
        """
        applied = bool(self.deepspeed.was_step_applied()) and not self._gate.refused
        gathered = gather_numbers([loss, self._grad_norm(norm), applied, stop], self.device)
        return StepResult(
            loss=None if scale == 0 else self._loss_average.mean(gathered[:, 0]),
            grad_norm=float(gathered[0, 1]),
            applied=bool(gathered[:, 2].all()),
            stop_requested=bool(gathered[:, 3].any()),
        )

    def _reduce_loss_and_norm(self, loss: float, norm: Tensor | float | None) -> tuple[float, float]:
        """Return loss and gradient norm before an update, bit-identical to `_reduce_step`'s. Collective."""
        gathered = gather_numbers([loss, self._grad_norm(norm)], self.device)
        return self._loss_average.mean(gathered[:, 0]), float(gathered[0, 1])

    def _grad_norm(self, norm: Tensor | float | None) -> float:
        """Return `norm`, or DeepSpeed's norm if it is None.

        DeepSpeed reports -1 for a norm that is not finite; it is returned as NaN.
        """
        known = getattr(self.deepspeed.optimizer, "_global_grad_norm", None) if norm is None else norm
        return float("nan") if known is None or known < 0 else float(known)

    def training_state_tensors(self) -> dict[Hashable, Tensor]:
        """Return the tensors that decide the following steps, in place.

        Weights that are rounded masters are left out: `sync_weights_from_masters` writes them.
        See `training_state.training_state_tensors`.
        """
        return training_state_tensors(self.module, self.deepspeed.optimizer)

    def sync_weights_from_masters(self) -> None:
        """Write the weights from their fp32 masters, after those were written to. Collective."""
        weights_from_masters(self.deepspeed.optimizer, self.module)

    def before_update(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` before each update of the weights. Returns a function that ends this."""
        return self._base_optimizer.register_step_pre_hook(lambda *_: callback()).remove

    def counters(self) -> dict[str, Any]:
        """Return the counters of DeepSpeed, its loss scaler and the optimizer."""
        return read_counters(self.deepspeed)

    def set_counters(self, values: dict[str, Any]) -> None:
        """Set what `counters` returned."""
        write_counters(self.deepspeed, values)

    def save(self, folder: Path, secure: Callable[[Path], str] | None = None) -> None:
        """Write DeepSpeed's checkpoint files of this rank to `folder`. Collective.

        A failed write is reported by `files.finish()`, which must follow: an exception here on one rank
        would leave the others waiting.

        Args:
            secure: if given, the state is copied, and a thread writes the copy and calls `secure` for each
                file; see `CheckpointFiles.start`.
        """
        self.files.begin(copied=secure is not None)
        self.deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        if secure is not None:
            self.files.start(secure)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote, into an engine that has not stepped yet. Collective.

        The settings of the optimizer remain those of this run.

        Raises:
            ValueError: DeepSpeed finds no checkpoint that it can load.
        """
        settings = read_settings(self.deepspeed.optimizer)
        loaded, _ = self.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
        if loaded is None:
            raise ValueError(f"--load: DeepSpeed finds no checkpoint in {folder}")
        write_settings(self.deepspeed.optimizer, settings)
        self._restore_micro_steps()

    def load_resharded(self, saved: TrainingTensors) -> None:
        """Load what another mesh or ZeRO stage saved, into an engine that has not stepped yet. Collective."""
        write_training_state(
            self.deepspeed.optimizer, self._base_optimizer, self.named_weights(), self._vocab_size, saved
        )
        self.sync_weights_from_masters()
        for name, value in saved.counters.items():
            setattr(self.deepspeed, name, value)
        self._restore_micro_steps()

    def _restore_micro_steps(self) -> None:
        """Recompute the number of micro-steps, which DeepSpeed does not save."""
        accumulation_steps = self.deepspeed.gradient_accumulation_steps()
        self.deepspeed.micro_steps = self.deepspeed.global_steps * accumulation_steps

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer that DeepSpeed's wraps, or the only one."""
        return base_optimizer(self.deepspeed.optimizer)


def _build_optimizer(model: nn.Module, config: Config, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Build torch's AdamW, or DeepSpeed's for the CPU if a GPU's optimizer state is offloaded to it."""
    if not settings["zero_optimization"].get("offload_optimizer") or computes_on_cpu():
        return build_optimizer(model, config.optimizer)
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles for a minute, once in an environment

    return build_optimizer(model, config.optimizer, DeepSpeedCPUAdam)


def count_local_parameters(module: nn.Module) -> int:
    """Count the parameters of a module; those that ZeRO-3 shards count in full."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def reduce_bucket_size(parameters: int) -> int:
    """Return the size, in elements, of the buffer in which ZeRO reduces gradients.

    It is DeepSpeed's default, or the number of parameters if that is smaller.
    """
    return min(500_000_000, parameters)
