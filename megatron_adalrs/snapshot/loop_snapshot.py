"""Everything that a plain torch training loop needs to go back to an earlier step, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_adalrs.snapshot.rng_state import RngState
from megatron_adalrs.snapshot.tensor_snapshot import TensorSnapshot


class Stateful(Protocol):
    """A part of a run with a state of its own: a scheduler, a data loader, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]:
        """The state as it is now."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Go back to a state."""


class LoopSnapshot:
    """The model's parameters and buffers, the optimizer's state and options, random streams and other parts.

    Tensors are restored in place. Optimizer state that was born after the capture is removed, and the
    optimizer makes it afresh as it did the first time. A later capture reuses the buffers of the one before.

    Args:
        directory: of a local disk to keep tensors on, instead of in host memory.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        parts: Sequence[Stateful] = (),
        directory: str | None = None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._parts = tuple(parts)
        self._tensors = TensorSnapshot(directory)
        self._options: list[dict[str, Any]] = []
        self._state_names: dict[Hashable, set[str]] = {}
        self._plain_state: dict[Tensor, dict[str, Any]] = {}
        self._part_states: list[dict[str, Any]] = []
        self._rng: RngState | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the copied tensors take."""
        return self._tensors.nbytes

    def capture(self) -> None:
        """Copy the state of the loop, between two steps."""
        optimizer = self._optimizer
        self._tensors.capture(self._named_tensors())
        self._tensors.finish()  # a loop of the user's own does not say when it writes to them
        self._options = [
            copy.deepcopy({name: value for name, value in group.items() if name != "params"})
            for group in optimizer.param_groups
        ]
        self._state_names = {owner: set(entries) for owner, entries in optimizer.state.items()}
        self._plain_state = {owner: _plain_copy(entries) for owner, entries in optimizer.state.items()}
        self._part_states = [copy.deepcopy(part.state_dict()) for part in self._parts]
        self._rng = RngState.capture()

    def restore(self) -> None:
        """Go back to the captured state, which stays captured.

        Raises:
            RuntimeError: nothing was captured, or a captured tensor is gone or has another shape.
        """
        if self._rng is None:
            raise RuntimeError("there is no captured state to go back to")
        self._remove_new_state()
        # A buffer that a module has registered since is a cache that it needs, not state to set to zero.
        now = self._named_tensors()
        self._tensors.restore({name: tensor for name, tensor in now.items() if name in self._tensors})
        for owner, entries in self._plain_state.items():
            self._optimizer.state[owner].update(copy.deepcopy(entries))
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            _restore_options(group, options)
        for part, state in zip(self._parts, self._part_states, strict=True):
            # A part may keep what it loads, and change it in place.
            part.load_state_dict(copy.deepcopy(state))
        self._rng.restore()

    def clear(self) -> None:
        """Forget what was captured and free its memory."""
        self._tensors.clear()
        self._plain_state, self._part_states, self._rng = {}, [], None

    def _named_tensors(self) -> dict[Hashable, Tensor]:
        named: dict[Hashable, Tensor] = {}
        for name, tensor in [*self._model.named_parameters(), *self._model.named_buffers()]:
            named[f"model.{name}"] = _without_repetitions(tensor)
        in_model = {id(parameter) for parameter in self._model.parameters()}
        numbers: dict[Hashable, int] = {}
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                number = numbers[parameter] = len(numbers)
                if id(parameter) not in in_model:
                    named[f"optimizer.params[{number}]"] = parameter
        for owner, entries in self._optimizer.state.items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    named[f"optimizer.state[{numbers.get(owner, owner)}][{name}]"] = value
        return named

    def _remove_new_state(self) -> None:
        state = self._optimizer.state
        for owner in list(state):
            for name in state[owner].keys() - self._state_names.get(owner, set()):
                del state[owner][name]
            if owner not in self._state_names:
                del state[owner]


def _without_repetitions(tensor: Tensor) -> Tensor:
    """The tensor, or of an expanded one the part that its elements are repetitions of, which can be written
    to."""
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _plain_copy(entries: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({name: value for name, value in entries.items() if not isinstance(value, Tensor)})


def _restore_options(group: dict[str, Any], options: dict[str, Any]) -> None:
    for name, value in options.items():
        if isinstance(group.get(name), Tensor) and isinstance(value, Tensor):
            group[name].copy_(value)  # in place: a compiled or captured step holds on to the tensor
        else:
            group[name] = copy.deepcopy(value)
