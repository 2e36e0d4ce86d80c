"""The weight averages that ``ema_decay`` keeps: for evaluation, and from and to torch's AveragedModel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from fusedopt import masters
from fusedopt.kernels.formats import average_dtype

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

_NAME = "ema"


def _averages(optimizer: FusedOptimizer) -> list[tuple[Tensor, Tensor]]:
    """Return each parameter that has an average, and the average."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [optimizer.state.get(parameter) or {} for parameter in parameters]
    return [(parameter, state[_NAME]) for parameter, state in zip(parameters, states, strict=True) if _NAME in state]


@contextlib.contextmanager
def swap(optimizer: FusedOptimizer) -> Iterator[None]:
    """Have the parameters of ``optimizer`` hold their averages for the time of the block."""
    if optimizer._swapped:
        raise RuntimeError("the parameters hold their averages already: end one swap_ema() before the next")
    pairs = _averages(optimizer)
    if not pairs:
        raise RuntimeError(
            f"no parameter of this {type(optimizer).__name__} has an average: construct it with ema_decay, and take a step first"
        )
    with torch.no_grad():
        kept = [parameter.detach().clone() for parameter, _ in pairs]
        for parameter, average in pairs:
            parameter.copy_(average)
    optimizer._swapped = True
    try:
        yield
    finally:
        optimizer._swapped = False
        with torch.no_grad():
            for (parameter, _), own in zip(pairs, kept, strict=True):
                parameter.copy_(own)
        if optimizer._prepared is not None and optimizer._prepared.plan is not None and optimizer._versions is not None:
            masters.remember(optimizer, optimizer._prepared.plan)  # they are what they were


def _copies(model: torch.nn.Module, averaged: AveragedModel) -> dict[Tensor, Tensor]:
    """Return the parameter in ``averaged`` that belongs to each of ``model``."""
    copies = dict(averaged.module.named_parameters())
    missing = [name for name, own in model.named_parameters() if name not in copies or copies[name].shape != own.shape]
    if missing:
        raise ValueError(f"the averaged model has no parameter {missing[0]!r} of the same shape: make it of the same model")
    return {parameter: copies[name] for name, parameter in model.named_parameters()}


@torch.no_grad()
def store(optimizer: FusedOptimizer, model: torch.nn.Module, averaged: AveragedModel) -> None:
    """Write the averages of ``optimizer`` into ``averaged``."""
    copies = _copies(model, averaged)
    for parameter, average in _averages(optimizer):
        if parameter in copies:
            copies[parameter].copy_(average)
    # What it counts tells it only whether it has averaged anything yet.
    averaged.n_averaged.fill_(max(1, int(averaged.n_averaged)))


@torch.no_grad()
def load(optimizer: FusedOptimizer, model: torch.nn.Module, averaged: AveragedModel) -> None:
    """Take over the averages of ``averaged`` into ``optimizer``."""
    copies = _copies(model, averaged)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["ema_decay"] is not None and parameter in copies:
                state = optimizer.state[parameter]
                if _NAME not in state:
                    state[_NAME] = torch.empty_like(parameter, dtype=average_dtype(parameter.dtype), requires_grad=False)
                state[_NAME].copy_(copies[parameter])
