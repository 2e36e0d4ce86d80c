"""What an optimizer keeps in memory: bytes by kind, and bytes a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedopt.kernels import layout


@dataclass(frozen=True)
class Memory:
    """Bytes that belong to the parameters of an optimizer.

    Args:
        elements: how many numbers the parameters have.
        bytes: by kind: parameters, gradients, each state, ``master``, the words of blocks of codes, and numbers such as ``step``.
    """

    elements: int
    bytes: Mapping[str, int]

    @property
    def states(self) -> int:
        """Bytes of all that the optimizer keeps: without parameters and gradients."""
        return sum(size for name, size in self.bytes.items() if name not in ("parameters", "gradients"))

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes of states for each number of the parameters."""
        return self.states / max(1, self.elements)

    def __str__(self) -> str:
        width = max(map(len, (*self.bytes, "all states")))
        rows = [*self.bytes.items(), ("all states", self.states)]
        return "\n".join(
            f"{name:<{width}} {size / 2**20:10.2f} MiB {size / max(1, self.elements):8.3f} bytes a parameter" for name, size in rows
        )


def memory(optimizer: torch.optim.Optimizer) -> Memory:
    """Return what the parameters, gradients and states of ``optimizer`` take, of sharded tensors this rank's parts.

    Args:
        optimizer: of fusedopt or torch; states appear with its first step.
    """
    found = {"parameters": 0, "gradients": 0}
    elements = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            elements += layout.local(parameter).numel()
            found["parameters"] += _bytes(parameter)
            found["gradients"] += 0 if parameter.grad is None else _bytes(parameter.grad)
            for name, value in (optimizer.state.get(parameter) or {}).items():
                if isinstance(value, Tensor):
                    kind = name if value.dim() else "numbers"
                    found[kind] = found.get(kind, 0) + _bytes(value)
    return Memory(elements, found)


def _bytes(tensor: Tensor) -> int:
    part = layout.local(tensor)
    return part.numel() * part.element_size()
