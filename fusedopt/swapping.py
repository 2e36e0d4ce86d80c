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
    """Give what a plan has put elsewhere, as step counts and the words of codes, back to the caller's tensors."""
    parameters = ((parameter, group) for group in optimizer.param_groups for parameter in group["params"])
    for (parameter, group), index in zip(parameters, indices, strict=True):
        held = checkpoints.with_packed(optimizer, group, optimizer.state[parameter])
        for name, value in states.get(index, {}).items():
            own = held.get(name)
            if isinstance(value, Tensor) and isinstance(own, Tensor) and own is not value and _is_like(own, value):
                value.copy_(own)


def _is_like(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.dtype == b.dtype or a.dim() == 0)
