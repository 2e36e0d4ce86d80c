"""A tensor that is no plain memory, as DTensor is none: every operation goes through Python, and there is no address to take."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_map


class WrappedTensor(torch.Tensor):
    """Holds another tensor and hands all operations to it."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"WrappedTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrap(value):
            return value.inner if isinstance(value, cls) else value

        result = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))
        if function._schema.is_mutable:
            return (kwargs or {}).get("out", args[0])
        return tree_map(lambda value: cls(value) if isinstance(value, torch.Tensor) else value, result)
