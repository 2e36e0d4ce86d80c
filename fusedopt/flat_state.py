"""Checkpoints as flat tensors and text, which is what safetensors can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def flatten_state(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of an optimizer's ``state_dict`` by name, ``"index.name"``, and all else as text.

    Args:
        state_dict: what an optimizer of fusedopt or torch returned.

    Raises:
        TypeError: if a state or an option is neither a tensor nor plain data.

    Example:
        >>> tensors, metadata = flatten_state(optimizer.state_dict())
        >>> safetensors.torch.save_file(tensors, "optimizer.safetensors", metadata)
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for index, values in state_dict["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, Tensor) else others)[f"{index}.{name}"] = value
    tensors = {name: value.detach().contiguous() for name, value in tensors.items()}
    groups = [{name: _plain(value) for name, value in group.items()} for group in state_dict["param_groups"]]
    return tensors, {"param_groups": json.dumps(groups), "state": json.dumps({name: _plain(v) for name, v in others.items()})}


def unflatten_state(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the ``state_dict`` that :func:`flatten_state` took apart.

    Args:
        tensors: by name.
        metadata: the text.

    Raises:
        ValueError: if ``metadata`` is not such text.
    """
    if "param_groups" not in metadata:
        raise ValueError(f"the metadata has {sorted(metadata)}, but not 'param_groups': pass what flatten_state returned")
    state: dict[int, dict[str, Any]] = {}
    values = {**json.loads(metadata.get("state", "{}")), **tensors}
    for key, value in values.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value if isinstance(value, Tensor) else _live(value)
    groups = [{name: _live(value) for name, value in group.items()} for group in json.loads(metadata["param_groups"])]
    return {"state": state, "param_groups": groups}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return {"tensor": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"tuple": [_plain(part) for part in value]}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {"mapping": {name: _plain(part) for name, part in value.items()}}
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    raise TypeError(f"a checkpoint holds {value!r}, which cannot be written as text: leave it out of the groups")


def _live(value: Any) -> Any:
    if isinstance(value, list):
        return [_live(part) for part in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]), device="cpu")
    if "tuple" in value:
        return tuple(_live(part) for part in value["tuple"])
    return {name: _live(part) for name, part in value["mapping"].items()}
