"""Remember every tensor that an optimizer can reach, to see that nothing in it changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of the whole storage of ``tensor`` as bytes: gaps of a view count, and NaN equals itself."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage()).clone()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same elements, bit for bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_flat_bytes(a), _flat_bytes(b))


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class Snapshot:
    """The parameters, gradients, states and hyperparameters of an optimizer at one moment."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, grads: bool = True) -> None:
        self._optimizer, self._grads = optimizer, grads
        self._before = self._read()

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for group_index, group in enumerate(self._optimizer.param_groups):
            found[f"group {group_index}"] = {key: value for key, value in group.items() if key != "params"}
            for index, param in enumerate(group["params"]):
                name = f"group {group_index} parameter {index}"
                found[name] = _contents(param)
                if self._grads:
                    found[f"{name} gradient"] = None if param.grad is None else _contents(param.grad)
                found[f"{name} states"] = {
                    # A new plan may move a state, its numbers unchanged.
                    key: _contents(value, place=False) if isinstance(value, torch.Tensor) else value
                    for key, value in self._optimizer.state.get(param, {}).items()
                }
        return found

    def differences(self) -> list[str]:
        """Return the names of what is no longer as it was."""
        after = self._read()
        assert after.keys() == self._before.keys()
        return [name for name, value in after.items() if not _equal(value, self._before[name])]

    def assert_unchanged(self) -> None:
        """Fail, naming what changed, unless everything is bit for bit as it was."""
        changed = self.differences()
        assert not changed, f"changed: {', '.join(changed)}"


def refused(optimizer, errors=RuntimeError, match=None):
    """Assert that the step raises and changes nothing, twice; return the message."""
    before = Snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(errors, match=match) as raised:
            optimizer.step()
        before.assert_unchanged()
    return str(raised.value)


def _contents(tensor: torch.Tensor, place: bool = True) -> tuple[Any, ...]:
    if isinstance(inner := getattr(tensor, "inner", None), torch.Tensor):  # a wrapper
        return _contents(inner)
    if tensor.is_sparse:
        return (tensor.shape, tensor.dtype, _contents(tensor._indices()), _contents(tensor._values()))
    if tensor.is_meta:
        return (tensor.shape, tensor.dtype)
    if not place:
        return (tensor.shape, tensor.dtype, _flat_bytes(tensor).clone())
    return (tensor.shape, tensor.dtype, tensor.stride(), tensor.data_ptr(), bits(tensor))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)
