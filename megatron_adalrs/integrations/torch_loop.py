"""AdaLRS for any torch optimizer and a plain training loop."""

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

# Where torch's optimizers and schedulers keep learning rates: numbers, tensors, or lists by group.
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_SCHEDULER_RATES = ("base_lrs", "max_lrs", "min_lrs", "eta_min", "_last_lr")


class AdaLRS:
    """Searches the base learning rate of a loop while it trains.

        adalrs = AdaLRS(model, optimizer, train_iters=10_000)
        while not adalrs.finished:
            ...                       # forward, loss.backward(), optimizer.step(), optimizer.zero_grad()
            adalrs.step(loss)

    A trial that is not better is undone: `step` restores the model, optimizer, scheduler, random generators
    and data to the start of the trial. Therefore the loop runs until `finished` and not over a range; `steps`
    counts the steps that were kept.

    Args:
        model: its parameters and buffers are what a failed trial restores.
        optimizer: any torch optimizer whose step takes no closure.
        train_iters: kept steps in the run.
        scheduler: its learning rates are scaled along, floors included. Step it before `AdaLRS.step`. A loop
            that sets `group["lr"]` itself multiplies it by `scale` instead.
        data: what the batches come from, with `state_dict` and `load_state_dict` (torchdata's
            StatefulDataLoader, say), so that the steps after an undone trial see the batches that the trial
            saw. Take the batches from `batches()`: most loaders only rewind when they are iterated anew.
            Without `data`, the steps after an undone trial see the batches that follow.
        parts: more objects with `state_dict` and `load_state_dict` to restore, a GradScaler for instance.
        warmup_iters: steps of warm-up in the scheduler, which the search stays clear of.
        settings: of the search. Default: `AdaLRSSettings(enabled=True)`.

    In distributed training, give `step` the loss averaged over all ranks, the very same number on each: every
    rank then takes the same decisions.

    Raises:
        ValueError: the search does not fit in the run; see `AdaLRSSettings.resolve`. Or its mode is "robust",
            or its budget "total". Or what is to go back with the model has no `state_dict` or
            `load_state_dict`.
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
        settings = settings or AdaLRSSettings(enabled=True)
        if settings.mode != "paper":
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
        """Steps that have been undone."""

    @property
    def steps(self) -> int:
        """Steps kept so far."""
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
        """Decide what follows and apply the decision. Call it last in every step.

        Args:
            loss: the step's loss, a number or a tensor with one element.
            applied: False when the optimizer skipped the step, for example because of a GradScaler.

        Raises:
            RuntimeError: `interrupt` was called, but not `resume`.
        """
        if self._interrupted:
            raise RuntimeError("a trial was interrupted: call resume() before the next step")
        decision = self._controller.observe(loss.item() if isinstance(loss, Tensor) else float(loss), applied)
        if decision.event is not None:
            self._apply_decision(decision)
        return decision

    def batches(self) -> Iterator[Any]:
        """Yield batches of `data` until the run is finished; go back in the data when a trial is undone.

        Raises:
            ValueError: There is no `data`, or it has no batches.
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
                # Loaders draw a seed for every iterator, but a run that was never taken back or saved had no
                # new iterator here.
                streams.restore()
            empty_epochs += 1
            for batch in epoch:
                empty_epochs = 0
                yield batch
                if self.finished or self._loop.rewinds != rewinds:
                    break
            # One may be empty: data that went back to the end of an epoch.
            if empty_epochs > 1:
                raise ValueError("data yields no batches")
            goes_on = self._loop.rewinds != rewinds

    def interrupt(self) -> Decision:
        """Undo the trial in progress, if any, so that a checkpoint can be saved. `resume` begins it again."""
        decision = self._controller.interrupt()
        if decision.event is not None:
            self._apply_decision(decision)
        return decision

    def resume(self) -> Decision:
        """Begin the trial again that `interrupt` has undone, if any. `load_state_dict` calls this method."""
        decision = self._controller.resume()
        if decision.event is not None:
            self._apply_decision(decision)
        return decision

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save along with that of the model, optimizer, scheduler and data.

        Raises:
            RuntimeError: A trial is in progress; call `interrupt` before saving anything.
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
            ValueError: The state is from a run with other settings.
        """
        self._controller.load_state_dict(state["controller"])
        self._loop.applied_scale = state["applied_scale"]
        self.discarded_steps = state["discarded_steps"]
        self._interrupted = False
        self._loop.rewinds += 1  # a running `batches` goes on from what data has loaded
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
    """The optimizer and scheduler that a search scales, and the snapshot of the loop.

    Paper mode has one snapshot at a time, so that its name is not needed.
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
        """Go back to the snapshot."""
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
    """Multiply every learning rate that the optimizer and its scheduler (None: none) hold by `ratio`.

    All of them, so that schedulers that compute a rate from its predecessor and those that compute it from
    the base rate both follow, at once and for the rest of the schedule. Reaches into the schedulers of a
    SequentialLR or ChainedScheduler.
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
        return rate.mul_(ratio)  # in place: a compiled or captured step holds on to the tensor
    return rate * ratio
