"""Snapshot with which a plain PyTorch training loop returns to an earlier step, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_adalrs.snapshot.rng_state import RngState
from megatron_adalrs.snapshot.tensor_snapshot import TensorSnapshot


class Stateful(Protocol):
    """Object with a state of its own, such as a scheduler, a data loader or a gradient scaler."""

    def state_dict(self) -> dict[str, Any]:
        """Return the current state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Load a state that `state_dict` returned."""


class LoopSnapshot:
    """Copy of a model, its optimizer, the random-number states and other stateful objects.

    Tensors are restored in place. Optimizer state that was created after the capture is removed, and the
    optimizer initializes it again. Later captures reuse the buffers of the first.

    Args:
        model: Model whose parameters and buffers are captured.
        optimizer: Optimizer whose state and options are captured.
        parts: Further objects whose state is captured.
        directory: Directory on a local disk for the tensors; they are kept in host memory by default.
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
        """Size of the copied tensors in bytes."""
        return self._tensors.nbytes

    def capture(self) -> None:
        """Copy the state of the loop; call it between two steps."""
        optimizer = self._optimizer
        self._tensors.capture(self._named_tensors())
        self._tensors.finish()  # the user's loop does not announce when it writes to the tensors
        self._options = [
            copy.deepcopy({name: value for name, value in group.items() if name != "params"})
            for group in optimizer.param_groups
        ]
        self._state_names = {owner: set(entries) for owner, entries in optimizer.state.items()}
        self._plain_state = {owner: _plain_copy(entries) for owner, entries in optimizer.state.items()}
        self._part_states = [copy.deepcopy(part.state_dict()) for part in self._parts]
        self._rng = RngState.capture()

    def restore(self) -> None:
        """Return to the captured state, which remains available for later restores.

        Raises:
            RuntimeError: If nothing was captured, or a captured tensor is missing or has another shape.
        """
        if self._rng is None:
            raise RuntimeError("there is no captured state to restore")
        self._remove_new_state()
        # A buffer that a module has registered since the capture is a cache in use, not state to set to zero.
        now = self._named_tensors()
        self._tensors.restore({name: tensor for name, tensor in now.items() if name in self._tensors})
        for owner, entries in self._plain_state.items():
            self._optimizer.state[owner].update(copy.deepcopy(entries))
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            _restore_options(group, options)
        for part, state in zip(self._parts, self._part_states, strict=True):
            # A part may keep a reference to the loaded state and change it in place.
            part.load_state_dict(copy.deepcopy(state))
        self._rng.restore()

    def clear(self) -> None:
        """Discard the captured state and free its memory."""
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
    """Return a view of the tensor without expanded dimensions, which can be written to in place."""
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _plain_copy(entries: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({name: value for name, value in entries.items() if not isinstance(value, Tensor)})


def _restore_options(group: dict[str, Any], options: dict[str, Any]) -> None:
    for name, value in options.items():
        if isinstance(group.get(name), Tensor) and isinstance(value, Tensor):
            group[name].copy_(value)  # in place: a compiled or captured step refers to this tensor
        else:
            group[name] = copy.deepcopy(value)
