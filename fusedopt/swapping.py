"""Other parameters and states for an optimizer, for the time of a ``with`` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusedopt import checkpoints
from fusedopt.optimizer import FusedOptimizer


@contextlib.contextmanager
def swap_in_optimizer_params_and_state(
    optimizer: torch.optim.Optimizer, swapin_parameters: dict[str, Tensor], swapin_optim_state: dict[str, Any]
) -> Iterator[None]:
    """Replace the parameters and states of ``optimizer`` for the time of the block, as torch.optim's function of this name.

    Args:
        optimizer: of fusedopt or torch.
        swapin_parameters: in the order of the optimizer's own.
        swapin_optim_state: as ``state_dict()`` returns it; its tensors are written in place.

    Raises:
        AttributeError: if this torch has no such function (2.13 has).
    """
    if not isinstance(optimizer, FusedOptimizer):
        with torch.optim.swap_in_optimizer_params_and_state(optimizer, swapin_parameters, swapin_optim_state):
            yield
        return
    # State dicts leave out options of ours that are at their defaults; torch asks for the keys of live groups.
    checkpoints.check_version(swapin_optim_state)
    groups = [
        {**{name: live[name] for name, _ in optimizer.own_options() if name in live}, **group}
        for live, group in zip(optimizer.param_groups, swapin_optim_state["param_groups"], strict=True)
    ]
    for group in groups:
        group.pop(checkpoints.VERSION_KEY, None)
    with torch.optim.swap_in_optimizer_params_and_state(
        optimizer, swapin_parameters, {**swapin_optim_state, "param_groups": groups}
    ):
        try:
            yield
        finally:
            _write_back(optimizer, swapin_optim_state["state"], [index for group in groups for index in group["params"]])


@torch.no_grad()
def _write_back(optimizer: FusedOptimizer, states: dict[Any, Any], indices: list[Any]) -> None:
    """Give step counts and other numbers, which a plan puts into vectors of its own, back to the caller's tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, index in zip(parameters, indices, strict=True):
        for name, value in states.get(index, {}).items():
            held = optimizer.state[parameter].get(name)
            if isinstance(value, Tensor) and value.dim() == 0 and isinstance(held, Tensor) and held is not value:
                value.copy_(held)
