"""What an optimizer remembers between steps, and the view of it that torch's own step is given."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedopt.kernels import tensor_objects
from fusedopt.kernels.plan import Plan


class TorchView:
    """The optimizer as torch's own step sees it: with some of the parameters, and without the gradient scaler."""

    grad_scale = None
    found_inf = None

    def __init__(self, optimizer: torch.optim.Optimizer, param_groups: list[dict[str, Any]]) -> None:
        self._optimizer = optimizer
        self.param_groups = param_groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Prepared:
    """A plan for the parameters of an optimizer, and what it was made for."""

    def __init__(self, parameters: list[Tensor], key: object) -> None:
        self.parameters = parameters
        self.key = key
        self.plan: Plan | None = None
        #: Parameters that share memory, one wave after the other; planned anew each time.
        self.waves: list[list[int]] = []
        #: Indices of the parameters that torch's own implementation updates, and of all that are updated at all.
        self.torch_indices: set[int] = set()
        self.indices: set[int] = set()
        #: Those of torch's own that are there for a sparse gradient alone.
        self.sparse_indices: set[int] = set()
        #: The name of the backend of each other.
        self.backends: dict[int, str] = {}
        self.state: object = None
        self.state_dicts: list[Any] = []
        self._lists: tensor_objects.Lists | None = None

    def listed(self, groups: Sequence[dict[str, Any]], state: dict[Tensor, Any]) -> list[Tensor] | None:
        """Return the parameters if the groups' lists of them, and the dict of states, surely hold what they held; or None."""
        held = self._lists is not None and self._lists.unchanged([group["params"] for group in groups], state)
        return self.parameters if held else None

    def holds(self, parameters: list[Tensor], key: object, groups: Sequence[dict[str, Any]], state: dict[Tensor, Any]) -> bool:
        """Whether parameters, options and the dicts of states are those that were planned for."""
        if self.key != key:
            return False
        if parameters is self.parameters:  # as listed
            return True
        held = (
            self.state is state
            and same_objects(self.parameters, parameters)
            and same_objects(self.state_dicts, list(state.values()))
        )
        # From the second step on, as a plan may be made for a single one.
        self._lists = tensor_objects.watch_lists([group["params"] for group in groups], state) if held else None
        return held

    @property
    def covers_all(self) -> bool:
        """Whether kernels update all parameters, whichever have gradients."""
        return not self.torch_indices and len(self.indices) == len(self.parameters)

    def covers(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether every parameter with a gradient was there to be planned for, and with a sparse one where that counts."""
        for index in self.sparse_indices:
            gradient = gradients[index]
            if gradient is not None and gradient.layout == torch.strided:
                return False
        return len(self.indices) == len(gradients) or all(
            index in self.indices for index, gradient in enumerate(gradients) if gradient is not None
        )

    def watch(self, state: dict[Tensor, Any]) -> None:
        """Note the dicts of states as they are now."""
        self.state, self.state_dicts = state, list(state.values())
        self._lists = None


def as_number(value: Any) -> float:
    """Return the number that ``value`` is or, as a tensor, holds."""
    return float(value.item()) if isinstance(value, Tensor) else float(value)


def same_objects(a: Sequence[object], b: Sequence[object]) -> bool:
    """Whether two sequences hold the same objects in the same order."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def levels_to_caller() -> int:
    """Return the ``stacklevel`` at which ``warnings.warn``, called by the caller, names the line outside of torch and us."""
    level, frame = 0, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("fusedopt", "torch"):
        level, frame = level + 1, frame.f_back
    return level + 1


def new_state(parameter: Tensor, initial: float) -> Tensor:
    """Return a state in the layout of ``parameter`` that holds ``initial``, in both parts of complex numbers."""
    value = complex(initial, initial) if parameter.is_complex() else initial
    return torch.full_like(parameter, value, memory_format=torch.preserve_format, requires_grad=False)
