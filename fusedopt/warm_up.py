"""Compile ahead: what the first steps of an optimizer would compile or load."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt import low_bit, paths
from fusedopt.kernels import blocks
from fusedopt.kernels.formats import Format
from fusedopt.kernels.tables import BY_ADDRESS
from fusedopt.optimizer import FusedOptimizer

# A plan is made in the first step, and what watches it in the second; the third finds all in place.
_STEPS = 3


def warmup(optimizer: FusedOptimizer, *, unscale: bool = False) -> None:
    """Compile the kernels of the first step of ``optimizer``, or load them from the cache, without taking it.

    Tiny parameters of the same dtypes and devices are stepped in its place. Parameters, gradients, states, hooks and the random
    numbers of the program stay as they are; gradients are taken to have their parameters' dtypes.

    Args:
        optimizer: one of fusedopt's, with its parameters and, where one is loaded, its state.
        unscale: whether a ``torch.amp.GradScaler`` will be in use, whose steps take other kernels (default: False).

    Raises:
        TypeError: if ``optimizer`` is not one of fusedopt's.

    Example:
        >>> optimizer = fusedopt.AdamW(model.parameters())
        >>> fusedopt.warmup(optimizer)
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"warmup() takes an optimizer of fusedopt, not {type(optimizer).__name__}, which compiles no kernels")
    with torch.inference_mode(False), torch.no_grad():
        tiny = _tiny(optimizer)
        for _ in range(_STEPS):
            tiny._step()
        if unscale:
            devices = [p.device for group in tiny.param_groups for p in group["params"]]
            for device in dict.fromkeys(devices):
                tiny.found_inf = torch.zeros(1, device=device)  # type: ignore[attr-defined]
                tiny.grad_scale = torch.ones(1, device=device)  # type: ignore[attr-defined]
                tiny._step()


def _tiny(optimizer: FusedOptimizer) -> FusedOptimizer:
    """Return a copy of ``optimizer`` with a small parameter for each kind of those that kernels update.

    It has one element, or as many as short formats begin with, where those of its kind have them.
    """
    groups: list[dict[str, Any]] = []
    states: defaultdict[Tensor, Any] = defaultdict(dict)
    for group in optimizer.param_groups:
        kinds: dict[object, Tensor] = {}
        for parameter in group["params"]:
            if paths.choose(optimizer, parameter, None, group)[0] in BY_ADDRESS:
                state = optimizer.state.get(parameter) or {}
                held = {name: value.dtype for name, value in state.items() if isinstance(value, Tensor)}
                short = parameter.numel() >= low_bit.SMALLEST and group.get("state_format") is not None
                kind = (parameter.dtype, parameter.device, short, *held.items())
                if kind not in kinds:
                    shape = (1,) * min(parameter.dim(), 2)
                    if short:
                        shape = (*shape[1:], low_bit.SMALLEST)
                    kinds[kind] = stand_in = torch.ones(shape, dtype=parameter.dtype, device=parameter.device)
                    stand_in.grad = torch.ones_like(stand_in)
                    if state:
                        codes = low_bit.held_codes(optimizer._update(group, False).rule, state)
                        states[stand_in] = {name: _small(name, value, shape, codes) for name, value in state.items()}
        groups.append({**group, "params": list(kinds.values())})
    tiny = type(optimizer).__new__(type(optimizer))
    tiny.__setstate__({"defaults": optimizer.defaults, "state": states, "param_groups": groups})
    return tiny


def _small(name: str, value: Any, shape: tuple[int, ...], codes: Mapping[str, Format]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0:
        return value.detach().clone()
    # As steps take it, whether or not a checkpoint has just brought it.
    form = codes.get(name.removesuffix("_words")) if name.endswith("_words") else None
    if form is not None:
        shape = (blocks.blocks(math.prod(shape)), form.words)
    dtype = torch.int16 if name == "master" and value.dtype == torch.uint8 else value.dtype
    return torch.zeros(shape, dtype=dtype, device=value.device)
