"""Checkpoints: states keep what they hold on the way in, and carry no more than themselves on the way out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt import low_bit

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

#: Where a checkpoint says what its codes mean, in each group; and the version of :mod:`fusedopt.kernels.codes`.
VERSION_KEY, VERSION = "codes_version", 1


class _Shielded:
    """A tensor that torch's ``load_state_dict`` passes on as it is.

    It would cast each to the parameter's dtype, by the base class's name for its policy, which no subclass can override.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shielded:
        return self


def shield(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return ``state_dict`` with the tensors of its states shielded."""
    return {**state_dict, "state": {key: _shield(value) for key, value in state_dict["state"].items()}}


def _shield(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Shielded(value)
    return {name: _shield(part) for name, part in value.items()} if isinstance(value, dict) else value


def unshield(state: dict[Any, Any]) -> None:
    """Put copies in the place of shielded tensors: on the parameter's device, in its layout, of the dtype they had."""
    for parameter, values in state.items():
        if isinstance(values, dict):
            # Codes keep their strides, which say in what order blocks were cut.
            state[parameter] = {name: _unshield(parameter, name, part, f"{name}_words" in values) for name, part in values.items()}
        elif isinstance(values, _Shielded):
            state[parameter] = values.tensor


def _unshield(parameter: Any, name: str, value: Any, coded: bool = False) -> Any:
    if isinstance(value, dict):
        return {key: _unshield(parameter, key, part) for key, part in value.items()}
    if not isinstance(value, _Shielded):
        return value
    tensor = value.tensor.detach()
    if name == "step" or not isinstance(parameter, Tensor):
        return tensor.clone()
    with torch.no_grad():
        if tensor.shape == parameter.shape and tensor.layout == torch.strided and not coded:
            return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
        return tensor.to(parameter.device, copy=True)


def without_shared_scalars(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return ``state_dict`` with step counts and other numbers that are views of a longer vector replaced by copies."""
    state = state_dict.get("state")
    if not isinstance(state, dict):
        return state_dict
    copies = {key: _without_shared_scalars(value) for key, value in state.items()}
    return {**state_dict, "state": defaultdict(dict, copies) if isinstance(state, defaultdict) else copies}


def without(state_dict: dict[str, Any], keys: Set[Any]) -> dict[str, Any]:
    """Return ``state_dict`` without the states of ``keys``, which are those of parameters that have not stepped."""
    if not keys:
        return state_dict
    kept = {key: value for key, value in state_dict["state"].items() if key not in keys}
    return {**state_dict, "state": defaultdict(dict, kept) if isinstance(state_dict["state"], defaultdict) else kept}


def _without_shared_scalars(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: part.clone() if _is_shared_scalar(part) else part for name, part in value.items()}


def _is_shared_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value._is_view()


def without_defaults(state_dict: dict[str, Any], options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """Return ``state_dict`` without those of the (name, value) ``options`` that torch's class lacks.

    A reader that asks for each key, as torch.distributed.checkpoint does, finds in torch's checkpoints only torch's.
    """
    groups = [{key: value for key, value in group.items() if (key, value) not in options} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def with_codes(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return ``state_dict``, that of ``optimizer``, with its codes as any sharding can read them, and with their version."""
    if not any(_has_codes(values) for values in state_dict["state"].values()):
        return state_dict
    state = dict(state_dict["state"])
    for live, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        state |= {index: with_packed(optimizer, live, state[index]) for index in saved["params"] if index in state}
    groups = [{**group, VERSION_KEY: VERSION} for group in state_dict["param_groups"]]
    return {**state_dict, "state": state, "param_groups": groups}


def with_packed(optimizer: FusedOptimizer, group: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return ``values``, the state of a parameter of ``group``, with its codes as checkpoints hold them."""
    return low_bit.packed(optimizer._update(group, False).rule, values) if _has_codes(values) else values


def _has_codes(values: Any) -> bool:
    return isinstance(values, dict) and any(name == "master" or str(name).endswith("_words") for name in values)


def check_version(state_dict: dict[str, Any]) -> None:
    """Raise ValueError if the codes of ``state_dict`` are of another version."""
    for group in state_dict["param_groups"]:
        version = group.get(VERSION_KEY, VERSION)
        if version != VERSION:
            raise ValueError(
                f"the checkpoint holds codes of version {version}, and this fusedopt knows version {VERSION}: load it with the "
                'version that wrote it, save state_dict(format="torch") there, and load that'
            )


def as_torchs(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return ``state_dict``, that of ``optimizer``, with plain tensors in place of codes, and without what torch does not have."""
    own = {name for name, _ in optimizer.own_options()}
    groups = [{name: value for name, value in group.items() if name not in own} for group in state_dict["param_groups"]]
    state = dict(state_dict["state"])
    if not optimizer._step_defaults:  # it keeps nothing in codes
        return {**state_dict, "param_groups": groups}
    decays = any(group.get("weight_decay", 0) for group in optimizer.param_groups)
    for live, saved in zip(optimizer.param_groups, groups, strict=True):
        update = optimizer._update(live, decays)
        for parameter, index in zip(live["params"], saved["params"], strict=True):
            if index not in state:
                continue
            values = {**state[index], **low_bit.floats(update.rule, parameter, state[index])}
            if live.get("state_format") is not None:
                values |= {name: values[name].float() for name in update.rule.states if name in values}
            ours = {"master", "ema", *(f"{name}_words" for name in update.rule.states)} - set(update.rule.states)
            if not optimizer._counts_steps:
                ours.add("step")
            state[index] = {name: value for name, value in values.items() if name not in ours}
    return {**state_dict, "state": state, "param_groups": groups}
