"""AdaLRS for a plain PyTorch training loop with any optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_adalrs.adalrs.controller import build_controller
from megatron_adalrs.adalrs.decision import Decision, Event, apply_decision
from megatron_adalrs.adalrs.settings import AdaLRSSettings
from megatron_adalrs.snapshot.loop_snapshot import LoopSnapshot, Stateful
from megatron_adalrs.snapshot.rng_state import RngState

# Attributes in which PyTorch's optimizers and schedulers keep learning rates: numbers, tensors, or lists by
# group.
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_SCHEDULER_RATES = ("base_lrs", "max_lrs", "min_lrs", "eta_min", "_last_lr")


class AdaLRS:
    """Learning-rate search in a training loop.

        adalrs = AdaLRS(model, optimizer, train_iters=10_000)
        while not adalrs.finished:
            ...                       # forward, loss.backward(), optimizer.step(), optimizer.zero_grad()
            adalrs.step(loss)

    A trial that is not better is undone: `step` restores the model, optimizer, scheduler, random generators
    and data to the start of the trial. Therefore the loop runs until `finished` and not over a range; `steps`
    counts the steps that were kept.

    Args:
        model: Model whose parameters and buffers are restored after an undone trial.
        optimizer: Any PyTorch optimizer whose `step` needs no closure.
        train_iters: Number of kept steps in the run.
        scheduler: Scheduler whose learning rates, including lower limits, are scaled with those of the
            optimizer. Step it before `AdaLRS.step`. A loop that sets `group["lr"]` itself must multiply it by
            `scale` instead.
        data: Source of the batches, with `state_dict` and `load_state_dict`, for example torchdata's
            StatefulDataLoader, so that the steps after an undone trial use the batches of the trial. Take the
            batches from `batches()`: most loaders only rewind with a new iterator. Without `data`, the steps
            after an undone trial use the following batches.
        parts: Further objects with `state_dict` and `load_state_dict` to restore, for example a GradScaler.
        warmup_iters: Number of warm-up steps of the scheduler, in which no search begins.
        settings: Settings of the search. Default: `AdaLRSSettings(mode="paper")`.

    In distributed training, pass the loss averaged over all ranks to `step`, so that every rank receives the
    same number and takes the same decisions.

    Raises:
        ValueError: If the search does not fit in the run (see `AdaLRSSettings.resolve`), its mode is "robust"
            or its budget "total", or an object to restore has no `state_dict` or `load_state_dict`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        train_iters: int,
        *,
        scheduler: Stateful | None = None,
        data: Any = None,
        parts: Sequence[Stateful] = (),
        warmup_iters: int = 0,
        settings: AdaLRSSettings | None = None,
    ) -> None:
        settings = settings or AdaLRSSettings(mode="paper")
        if settings.mode == "robust":
            raise ValueError(
                f"adalrs.mode={settings.mode!r} needs a loop that can repeat the same batches from the "
                'first step on; the plug-in supports only mode "paper", pretrain_gpt.py supports both'
            )
        if settings.budget != "kept":
            raise ValueError(
                f"adalrs.budget={settings.budget!r} needs a schedule that counts discarded steps, but the "
                "schedule of a plain loop is rolled back with them; "
                'the plug-in supports only budget "kept", pretrain_gpt.py supports both'
            )
        self._controller = build_controller(settings, train_iters, warmup_iters)
        self._train_iters = train_iters
        self._data = data
        named = {
            "scheduler": scheduler,
            "data": data,
            **{f"parts[{n}]": part for n, part in enumerate(parts)},
        }
        restored = {name: part for name, part in named.items() if part is not None}
        for name, part in restored.items():
            _require_stateful(name, part)
        snapshot = LoopSnapshot(model, optimizer, list(restored.values()), settings.snapshot_dir)
        self._loop = _Loop(optimizer, scheduler, snapshot)
        self._interrupted = False
        self.discarded_steps = 0
        """Number of undone steps."""

    @property
    def steps(self) -> int:
        """Number of kept steps."""
        return self._controller.step

    @property
    def finished(self) -> bool:
        """Whether `train_iters` steps have been kept."""
        return self.steps >= self._train_iters

    @property
    def scale(self) -> float:
        """Factor on the learning rate of the next step."""
        return self._controller.scale

    @property
    def phase(self) -> str:
        """State of the search: "before", "watch", "trial" or "done"; "fixed" without a search."""
        return self._controller.phase

    def step(self, loss: float | Tensor, applied: bool = True) -> Decision:
        """Decide after a step and apply the decision. Call it last in every step.

        Args:
            loss: Loss of the step, a number or a tensor with one element.
            applied: False if the optimizer skipped the step, for example because of a GradScaler.

        Raises:
            RuntimeError: If `interrupt` was called, but not `resume`.
        """
        if self._interrupted:
            raise RuntimeError("a trial was interrupted: call resume() before the next step")
        decision = self._controller.observe(loss.item() if isinstance(loss, Tensor) else float(loss), applied)
        if decision.event is not None:
            self._apply_decision(decision)
        return decision

    def batches(self) -> Iterator[Any]:
        """Yield batches of `data` until the run is finished, and rewind the data when a trial is undone.

        Raises:
            ValueError: If there is no `data`, or it yields no batches.
        """
        if self._data is None:
            raise ValueError("batches() needs the argument data of AdaLRS, which is None")
        empty_epochs = 0
        goes_on = self.steps > 0
        while not self.finished:
            rewinds = self._loop.rewinds
            streams = RngState.capture()
            epoch = iter(self._data)
            if goes_on:
                # Loaders draw a seed for every iterator, but a run without undone trials or restarts needs no
                # new iterator here.
                streams.restore()
            empty_epochs += 1
            for batch in epoch:
                empty_epochs = 0
                yield batch
                if self.finished or self._loop.rewinds != rewinds:
                    break
            # One epoch may be empty, if the data was rewound to the end of an epoch.
            if empty_epochs > 1:
                raise ValueError("data yields no batches")
            goes_on = self._loop.rewinds != rewinds

    def interrupt(self) -> Decision:
        """Undo the trial in progress, if any, so that a checkpoint can be saved. `resume` repeats it."""
        decision = self._controller.interrupt()
        if decision.event is not None:
            self._apply_decision(decision)
        return decision

    def resume(self) -> Decision:
        """Repeat the trial that `interrupt` has undone, if any. `load_state_dict` calls this method."""
        decision = self._controller.resume()
        if decision.event is not None:
            self._apply_decision(decision)
        return decision

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save along with that of the model, optimizer, scheduler and data.

        Raises:
            RuntimeError: If a trial is in progress; call `interrupt` before saving anything.
        """
        if self._controller.has_pending_rollback and not self._interrupted:
            raise RuntimeError("a trial is in progress: call interrupt() before saving and resume() after it")
        return {
            "controller": self._controller.state_dict(),
            "applied_scale": self._loop.applied_scale,
            "discarded_steps": self.discarded_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state. Load the model, optimizer, scheduler and data first.

        Raises:
            ValueError: If the state is from a run with other settings.
        """
        self._controller.load_state_dict(state["controller"])
        self._loop.applied_scale = state["applied_scale"]
        self.discarded_steps = state["discarded_steps"]
        self._interrupted = False
        self._loop.rewinds += 1  # a running `batches` continues at the loaded position
        self.resume()

    def _apply_decision(self, decision: Decision) -> None:
        apply_decision(decision, self._loop)
        if decision.restore is not None:
            self.discarded_steps += decision.discarded_steps
        self._interrupted = decision.event is Event.INTERRUPTED
        # An interrupted run is saved with the learning rates from before the trial.
        if not self._interrupted:
            self._loop.scale_to(decision.scale_after)
        if self.phase == "done":
            self._loop.free()


class _Loop:
    """Optimizer and scheduler of a loop, and its snapshot.

    Paper mode has only one snapshot at a time, so the name of a snapshot is ignored.
    """

    def __init__(self, optimizer: Optimizer, scheduler: Any, snapshot: LoopSnapshot) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._snapshot = snapshot
        self._scale_at_capture = 1.0
        self.applied_scale = 1.0
        """Factor by which the learning rates have been multiplied so far."""
        self.rewinds = 0
        """Number of times that the position in the data was set from outside the loop."""

    def capture(self, name: str) -> None:
        """Take a snapshot of the loop."""
        self._snapshot.capture()
        self._scale_at_capture = self.applied_scale

    def restore(self, name: str) -> None:
        """Return to the snapshot."""
        self._snapshot.restore()
        self.applied_scale = self._scale_at_capture
        self.rewinds += 1

    def scale_to(self, scale: float) -> None:
        """Multiply the learning rates so that `scale` is applied in total."""
        if scale != self.applied_scale:
            scale_learning_rates(self._optimizer, self._scheduler, scale / self.applied_scale)
            self.applied_scale = scale

    def free(self) -> None:
        """Free the snapshot's memory."""
        self._snapshot.clear()


def scale_learning_rates(optimizer: Optimizer, scheduler: Any, ratio: float) -> None:
    """Multiply all learning rates of an optimizer and its scheduler by `ratio`.

    Schedulers compute a rate from the previous rate or from the base rate, so both are scaled, for the
    current step and the rest of the schedule.

    Args:
        optimizer: Optimizer whose learning rates are scaled in every parameter group.
        scheduler: Scheduler of the optimizer, or None. The schedulers inside a SequentialLR or
            ChainedScheduler are scaled too.
        ratio: Factor on the learning rates.
    """
    tensors: set[int] = set()  # several groups may hold one tensor, which is scaled in place
    for group in optimizer.param_groups:
        for name in _GROUP_RATES:
            if name in group and id(group[name]) not in tensors:
                group[name] = _scaled(group[name], ratio)
                if isinstance(group[name], Tensor):
                    tensors.add(id(group[name]))
    for one in _with_nested(scheduler):
        for name in _SCHEDULER_RATES:
            if hasattr(one, name):
                setattr(one, name, _scaled(getattr(one, name), ratio))


def _require_stateful(name: str, part: Any) -> None:
    for method in ("state_dict", "load_state_dict"):
        if not callable(getattr(part, method, None)):
            raise ValueError(
                f"{name}: {type(part).__name__} has no {method}, which is needed to undo a trial"
                + ("; torchdata's StatefulDataLoader has both" if name == "data" else "")
            )


def _with_nested(scheduler: Any) -> Iterator[Any]:
    if scheduler is not None:
        yield scheduler
        for nested in getattr(scheduler, "_schedulers", ()):
            yield from _with_nested(nested)


def _scaled(rate: Any, ratio: float) -> Any:
    if isinstance(rate, (list, tuple)):
        return type(rate)(one * ratio for one in rate)
    if isinstance(rate, Tensor):
        return rate.mul_(ratio)  # in place: a compiled or captured step refers to this tensor
    return rate * ratio
